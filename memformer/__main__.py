from memformer.cli import main

main()
