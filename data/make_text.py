"""Make data/vocabulary.txt and data/sentences.txt, the text that invlib carries, from Jane Austen's novels.

    apt-get download r-cran-janeaustenr && dpkg -x r-cran-janeaustenr_*.deb janeausten
    python data/make_text.py --novels janeausten            # writes both files
    python data/make_text.py --novels janeausten --check    # compares: exit status 1 where one differs
    python data/make_text.py --novels janeausten --training .   # and writes austen_train.txt into that folder

Nothing is random. Of each novel the first nine tenths are for training, and give the vocabulary; the
sentences are from the last tenth: those of 4 to 32 tokens whose words are all in the vocabulary.
"""

from __future__ import annotations

import argparse
import re
import sys
import zlib
from collections import Counter
from pathlib import Path

from invlib.data import text

HERE = Path(__file__).resolve().parent
SIZE = 2000
LENGTHS = range(4, 33)
_HEADING = re.compile(r"(?i)(chapter|volume)\b.{0,12}$|finis$|the end$")
_STRING = b"\0\0\0\x10"  # R's type of a vector of strings, as written in big-endian order


def novels(path: Path) -> list[str]:
    """Read the novels from R's database of the package: compressed vectors of lines, one after the other."""
    left, found = path.read_bytes(), []
    while left:
        unpack = zlib.decompressobj()
        raw = unpack.decompress(left[4:])
        left = unpack.unused_data
        at = raw.index(_STRING) + 4
        count, at = int.from_bytes(raw[at : at + 4], "big"), at + 4
        lines = []
        for _ in range(count):
            size = int.from_bytes(raw[at + 4 : at + 8], "big")
            lines.append(raw[at + 8 : at + 8 + size].decode())
            at += 8 + size
        end = next((i for i, line in enumerate(lines) if line.startswith("A NOTE ON THE TEXT")), len(lines))
        found.append("\n".join(line for line in lines[:end] if not _HEADING.match(line.strip())))
    return found


def parts(path: Path) -> tuple[list[str], list[str]]:
    """Return the tokens for training and those held out, of all novels in turn."""
    training: list[str] = []
    held: list[str] = []
    for novel in novels(path):
        words = text.tokens(novel)
        cut = len(words) * 9 // 10
        cut = words.index(".", cut) + 1
        training += words[:cut]
        held += words[cut:]
    return training, held


def made(training: list[str], held: list[str]) -> dict[str, str]:
    """Return what each file has in it."""
    counts = Counter(training)
    order = sorted(counts, key=lambda word: (-counts[word], word))
    vocabulary = [text.PAD, text.UNKNOWN, *order[: SIZE - 2]]
    known, found, sentence = set(vocabulary), dict[str, None](), []
    for word in held:
        sentence.append(word)
        if word in ".!?":
            if len(sentence) in LENGTHS and known.issuperset(sentence) and sentence[0] not in "--,;:":
                found[re.sub(r" ([.,;:!?])", r"\1", " ".join(sentence))] = None
            sentence = []
    return {"vocabulary.txt": "\n".join(vocabulary) + "\n", "sentences.txt": "\n".join(found) + "\n"}


def main() -> int:
    """Write the files, or compare them with what would be written."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--novels", type=Path, default=Path("/"), help="where the package was unpacked to")
    parser.add_argument("--check", action="store_true", help="compare with the files that are there")
    parser.add_argument("--training", type=Path, help="write the text to train on into this folder")
    args = parser.parse_args()
    path = args.novels / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
    if not path.is_file():
        print(f"{path}: no such file; `apt install r-cran-janeaustenr`, or pass --novels", file=sys.stderr)
        return 1
    training, held = parts(path)
    files = made(training, held)
    if args.training is not None:
        args.training.mkdir(parents=True, exist_ok=True)
        (args.training / "austen_train.txt").write_text(" ".join(training) + "\n", encoding="utf-8")
    wrong = []
    for name, content in files.items():
        if args.check:
            kept = HERE / name
            wrong += [name] * (not kept.is_file() or kept.read_text(encoding="utf-8") != content)
        else:
            (HERE / name).write_text(content, encoding="utf-8")
            print(f"{name}: {len(content):,} bytes, {content.count(chr(10)):,} lines")
    if args.check:
        print(f"{' and '.join(wrong)} differ" if wrong else f"{' and '.join(files)}: as made by this script")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
