"""`python -m hashret` runs the command line."""

if __name__ == "__main__":
    from hashret.cli import main

    main()
