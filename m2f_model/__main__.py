from m2f_model.cli import main

main()
