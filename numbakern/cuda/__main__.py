"""``python -m numbakern.cuda [architecture …]``: what the kernels became, as tables."""

import sys

from numbakern.cuda import codegen


def main(architectures):
    """Print the table of each architecture."""
    for arch in architectures or codegen.ARCHITECTURES:
        print(codegen.table(codegen.cases(), arch), flush=True)
        print()


if __name__ == "__main__":
    main(sys.argv[1:])
