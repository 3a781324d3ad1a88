"""Labels of the data sets that weights are published for: their names, and which of them are stuff.

An entry below is a label: its names, the first one used here, and `*` after those of stuff. The order and the stuff
labels are those that the published code registers (detectron2, Mask2Former).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

#: COCO's 133 panoptic labels. The first 80, things, are those of its instance data.
_COCO = """
person; bicycle; car; motorcycle/motorbike; airplane/aeroplane; bus; train; truck; boat; traffic light; fire hydrant;
stop sign; parking meter; bench; bird; cat; dog; horse; sheep; cow; elephant; bear; zebra; giraffe; backpack;
umbrella; handbag; tie; suitcase; frisbee; skis; snowboard; sports ball; kite; baseball bat; baseball glove;
skateboard; surfboard; tennis racket; bottle; wine glass; cup; fork; knife; spoon; bowl; banana; apple; sandwich;
orange; broccoli; carrot; hot dog; pizza; donut; cake; chair; couch/sofa; potted plant/pottedplant; bed;
dining table/diningtable; toilet; tv/tvmonitor; laptop; mouse; remote; keyboard; cell phone; microwave; oven; toaster;
sink; refrigerator; book; clock; vase; scissors; teddy bear; hair drier/hair dryer; toothbrush; banner*; blanket*;
bridge*; cardboard*; counter*; curtain*; door-stuff*; floor-wood*; flower*; fruit*; gravel*; house*; light*;
mirror-stuff*; net*; pillow*; platform*; playingfield*; railroad*; river*; road*; roof*; sand*; sea*; shelf*; snow*;
stairs*; tent*; towel*; wall-brick*; wall-stone*; wall-tile*; wall-wood*; water-other*; window-blind*; window-other*;
tree-merged*; fence-merged*; ceiling-merged*; sky-other-merged*; cabinet-merged*; table-merged*; floor-other-merged*;
pavement-merged*; mountain-merged*; grass-merged*; dirt-merged*; paper-merged*; food-other-merged*;
building-other-merged*; rock-merged*; wall-other-merged*; rug-merged*
"""

#: ADE20K's 150 labels. Its 100 things are the labels of its instance data.
_ADE20K = """
wall*; building*; sky*; floor*; tree*; ceiling*; road*; bed; windowpane/window; grass*; cabinet; sidewalk*; person;
earth*; door; table; mountain*; plant*; curtain; chair; car; water*; painting; sofa; shelf; house*; sea*; mirror;
rug*; field*; armchair; seat; fence; desk; rock*; wardrobe; lamp; bathtub/tub; railing/rail; cushion; base*; box;
column; signboard; chest of drawers; counter; sand*; sink; skyscraper*; fireplace; refrigerator; grandstand*; path*;
stairs; runway*; case; pool table; pillow; screen door; stairway*; river*; bridge*; bookcase; blind*; coffee table;
toilet; flower; book; hill*; bench; countertop; stove; palm; kitchen island; computer; swivel chair; boat; bar*;
arcade machine; hovel*; bus; towel; light; truck; tower*; chandelier; awning; streetlight/street lamp; booth;
television receiver/tv; airplane/plane; dirt track*; apparel/clothes; pole; land*; bannister; escalator*; ottoman;
bottle; buffet*; poster*; stage*; van; ship; fountain; conveyer belt*; canopy*; washer; plaything; swimming pool*;
stool; barrel; basket; waterfall/falls*; tent*; bag; minibike; cradle*; oven; ball; food; step; tank*; trade name;
microwave; pot; animal; bicycle; lake*; dishwasher; screen; blanket*; sculpture; hood; sconce; vase; traffic light;
tray; ashcan/trash can; fan; pier*; crt screen*; plate; monitor; bulletin board; shower*; radiator; glass; clock; flag
"""

#: Cityscapes' 19 labels. Its 8 things are the labels of its instance data.
_CITYSCAPES = """
road*; sidewalk*; building*; wall*; fence*; pole*; traffic light*; traffic sign*; vegetation*; terrain*; sky*; person;
rider; car; truck; bus; train; motorcycle; bicycle
"""

#: Mapillary Vistas 1.2's 65 labels.
_MAPILLARY = """
Bird; Ground Animal; Curb*; Fence*; Guard Rail*; Barrier*; Wall*; Bike Lane*; Crosswalk - Plain; Curb Cut*; Parking*;
Pedestrian Area*; Rail Track*; Road*; Service Lane*; Sidewalk*; Bridge*; Building*; Tunnel*; Person; Bicyclist;
Motorcyclist; Other Rider; Lane Marking - Crosswalk; Lane Marking - General*; Mountain*; Sand*; Sky*; Snow*; Terrain*;
Vegetation*; Water*; Banner; Bench; Bike Rack; Billboard; Catch Basin; CCTV Camera; Fire Hydrant; Junction Box;
Mailbox; Manhole; Phone Booth; Pothole*; Street Light; Pole; Traffic Sign Frame; Utility Pole; Traffic Light;
Traffic Sign (Back); Traffic Sign (Front); Trash Can; Bicycle; Boat; Bus; Car; Caravan; Motorcycle; On Rails*;
Other Vehicle; Trailer; Truck; Wheeled Slow; Car Mount*; Ego Vehicle*
"""


@dataclass(frozen=True)
class Labels:
    """The labels of a data set: `names` in their order, and which of them are `stuff`, of one segment per image."""

    names: tuple[str, ...]
    stuff: tuple[int, ...]
    #: For each label all of its names, as sets of words.
    _known: tuple[tuple[frozenset[str], ...], ...]

    @classmethod
    def parse(cls, text: str, things_only: bool = False) -> Labels:
        """From one of the tables above; `things_only` as instance data have them."""
        entries = [entry.strip() for entry in text.split(";")]
        entries = [entry for entry in entries if not (things_only and entry.endswith("*"))]
        names = [entry.rstrip("*").split("/") for entry in entries]
        stuff = tuple(i for i, entry in enumerate(entries) if entry.endswith("*"))
        return cls(tuple(n[0] for n in names), stuff, tuple(tuple(map(_words, n)) for n in names))

    def match(self, names: Sequence[str]) -> bool:
        """True if `names` are these labels, in this order."""
        return len(names) == len(self.names) and all(
            any(_alike(_words(part), ours) for part in name.split(",") for ours in known)
            for known, name in zip(self._known, names, strict=True)
        )


#: Words in COCO's names of stuff that other data sets leave out.
_OPTIONAL = {"merged", "other", "stuff"}


def same_labels(a: Sequence[str], b: Sequence[str]) -> bool:
    """True if both name the same labels in the same order, apart from words that one of them leaves out."""
    return len(a) == len(b) and all(x == y or _alike(_words(x), _words(y)) for x, y in zip(a, b, strict=True))


def rows_of(names: Sequence[str], known: Sequence[str]) -> list[int | None]:
    """For each of `names` the index in `known` of the same class, or None; no index occurs twice.

    Names are compared without case, and without the words "merged", "other" and "stuff", as in `sky` and
    `sky-other-merged`. Of names with commas, as ADE20K has them, one equal part is enough. An ambiguous name has None.
    """
    rows: list[int | None] = [None] * len(names)
    for keys in (lambda name: {name.strip().casefold()}, _parts):
        open_names = [name if row is None else None for name, row in zip(names, rows, strict=True)]
        free = [k for k in range(len(known)) if k not in rows]
        fits = [[k for k in free if name is not None and keys(name) & keys(known[k])] for name in open_names]
        wanted = Counter(k for found in fits for k in found)
        for i, found in enumerate(fits):
            if len(found) == 1 and wanted[found[0]] == 1:
                rows[i] = found[0]
    return rows


def _alike(a: frozenset[str], b: frozenset[str]) -> bool:
    """True if one has all words of the other."""
    return bool(a and b) and (a <= b or b <= a)


def _parts(name: str) -> set[frozenset[str]]:
    """The words of each part of a name; none of a part without letters and digits, which would be as any other."""
    return {words for part in name.split(",") if (words := _words(part))}


def _words(name: str) -> frozenset[str]:
    words = frozenset(re.findall(r"[^\W_]+", name.casefold()))
    return words - _OPTIONAL or words


#: Data sets by the name that they have in presets.
DATASETS: dict[str, Labels] = {
    "coco-panoptic": Labels.parse(_COCO),
    "coco-instance": Labels.parse(_COCO, things_only=True),
    "ade20k-panoptic": Labels.parse(_ADE20K),
    "ade20k-instance": Labels.parse(_ADE20K, things_only=True),
    "ade20k-semantic": Labels.parse(_ADE20K),
    "cityscapes-panoptic": Labels.parse(_CITYSCAPES),
    "cityscapes-instance": Labels.parse(_CITYSCAPES, things_only=True),
    "cityscapes-semantic": Labels.parse(_CITYSCAPES),
    "mapillary-panoptic": Labels.parse(_MAPILLARY),
    "mapillary-semantic": Labels.parse(_MAPILLARY),
}


def recognise(names: Sequence[str] | None, count: int) -> Labels | None:
    """The published data set with these labels, or None.

    Args:
        names: of all labels, in order. Without names only the 133 of COCO are recognised.
        count: of labels.
    """
    if names is None:
        return DATASETS["coco-panoptic"] if count == 133 else None
    return next((labels for labels in DATASETS.values() if labels.match(names)), None)
