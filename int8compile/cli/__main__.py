from int8compile.cli import main

main()
