"""`cabochon`, or `python -m cabochon`: the allocator's pages first, for they are chosen as a process starts."""

from cabochon.heap import ask_for_huge_pages


def main() -> None:
    """Start again with huge pages where this machine has them, then be the command."""
    ask_for_huge_pages()
    from cabochon import cli

    cli.main()


if __name__ == "__main__":
    main()
