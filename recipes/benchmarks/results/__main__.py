"""Write all pages of results from the records that runs left in `model_cards/`; nothing is measured.

    python -m recipes.benchmarks.results
    python -m recipes.benchmarks.results --check

That is `model_cards/README.md`, the pages `model_cards/benchmark_*.md`, the tables between marks in the README of the
repository, and the pictures of the benchmark of accuracy. With `--check` nothing is written; it fails where a page is
not what the records say.
"""

import argparse
import sys

from recipes.benchmarks.accuracy.plot import plot
from recipes.benchmarks.results.pages import pages
from recipes.benchmarks.results.records import CARDS, ROOT, read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="Write nothing; fail where a page is out of date.")
    is_check = parser.parse_args().check
    found = pages()
    outdated = [file for file, text in found.items() if not file.is_file() or file.read_text(encoding="utf-8") != text]
    names = ", ".join(str(file.relative_to(ROOT)) for file in outdated) or "nothing"
    if is_check:
        sys.exit(f"Out of date: {names}. Run `python -m recipes.benchmarks.results`." if outdated else None)
    for file in outdated:
        file.write_text(found[file], encoding="utf-8")
    plot(read("benchmark_accuracy.json"), CARDS, "benchmark_accuracy")
    print(f"Written: {names}, and the pictures of the benchmark of accuracy.")


if __name__ == "__main__":
    main()
