from int8compile.cli.app import main

main()
