"""Other packages' models on the operators of this one."""
