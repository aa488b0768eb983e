"""`python -m qkscope`: the command line, for who starts it by module, as torchrun does."""

from .cli import main

if __name__ == "__main__":
    main()
