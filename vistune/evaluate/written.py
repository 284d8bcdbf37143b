"""Answers on disk as they come: a row each, taken up again after a kill by any number of processes, and never mixed
with those of another model, other settings or other questions.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from vistune import console, ranks
from vistune.asking import Said
from vistune.evaluate import official
from vistune.evaluate.items import Answer, Key, Question
from vistune.models import hub

ANSWERS, ASKED = "answers.jsonl", "asked.json"
"""LLaVA's rows, in the order of the questions; what was asked of whom, beside them."""
PART = "answers.{rank}.jsonl"

_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".distcp"}
_SAYS = {".json", ".jinja", ".model", ".txt"}
_BLOCK, _BLOCKS = 4096, 64  # of a file that is larger, so much is read, spread over it


class Written:
    """The answers to `questions` in `folder`. Every rank has one; `asked` says what they are answers of.

    `rows[i]` is the row of question i, or None. ValueError, on every rank, when the folder holds answers of something
    else.
    """

    def __init__(self, folder: Path, questions: Sequence[Question], asked: Mapping[str, Any], model: str):
        self.folder, self.questions, self.model = folder, questions, model
        self._file: IO[str] | None = None
        self._held: IO[bytes] | None = None
        self.rows: list[dict[str, Any] | None] = []
        ranks.on_first(lambda: self._begin(dict(asked)))
        self.rows = ranks.from_first(self.rows)

    def _begin(self, asked: dict[str, Any]) -> None:
        """What is there, in one file again: the processes that go on need not be those that began."""
        self.folder.mkdir(parents=True, exist_ok=True)
        note = self.folder / ASKED
        if note.exists():
            _compare(self.folder, _note(note), asked)
        elif any(self._parts()):
            raise ValueError(
                f"{self.folder}: holds answers, and {ASKED} does not say whose; give another --out, or remove it"
            )
        else:
            official.write(note, json.dumps(asked, indent=2) + "\n")
        self._held = _hold(note)
        self.rows = self._read()
        self._gather(PART.format(rank=0))

    def write(self, at: int, said: Said) -> None:
        """The answer to question `at`; on disk when this returns, whatever becomes of the process."""
        row = _row(self.questions[at], said, self.model)
        if self._file is None:
            path = self.folder / PART.format(rank=ranks.rank())
            self._file = path.open("a", encoding="utf-8", newline="\n")
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._file.flush()
        self.rows[at] = row

    def close(self) -> None:
        """Write no more, and let others into the folder."""
        for file in (self._file, self._held):
            if file is not None:
                file.close()
        self._file = self._held = None

    def merge(self) -> None:
        """Every rank's answers into one file, on rank 0, which then has the rows of all; all ranks wait for it."""
        ranks.barrier()
        if ranks.is_first():
            self.rows = self._read()
            self._gather(ANSWERS)
        ranks.barrier()
        self.close()

    def answers(self) -> list[Answer]:
        return [
            Answer(id=row["question_id"], prompt=row["prompt"], text=row["text"], row=row)
            for row in self.rows
            if row is not None
        ]

    def _read(self) -> list[dict[str, Any] | None]:
        """The row of each question, of all files there; what is torn or answers none of them is left."""
        found: defaultdict[Key, deque[dict[str, Any]]] = defaultdict(deque)
        for path in self._parts():
            for row in _whole_rows(path):
                found[str(row["question_id"]), str(row["prompt"])].append(row)
        return [found[one.key].popleft() if found[one.key] else None for one in self.questions]

    def _gather(self, name: str) -> None:
        """All rows in the file `name`, and no other."""
        rows = [json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows if row is not None]
        others = [path for path in self._parts() if path.name != name]
        if rows:
            official.write(self.folder / name, "".join(rows))
        for path in others:
            path.unlink()

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob("answers.jsonl")) + sorted(self.folder.glob("answers.*.jsonl"))


def _hold(note: Path) -> IO[bytes]:
    """The folder for this evaluation alone, as long as the process lives or the file is open. ValueError when another
    is at work there; where the file system knows no locks, nobody can tell."""
    file = note.open("rb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(
            f"{note.parent}: another evaluation is at work there; wait for it, or give another --out"
        ) from None
    except OSError as error:
        console.warn(f"{note.parent}: cannot be locked ({error}); let no other evaluation write there")
    return file


def _row(question: Question, said: Said, model: str) -> dict[str, Any]:
    """A row as LLaVA writes it, and what its benchmark wants beside."""
    short = hashlib.sha256("\0".join((model, str(question.id), question.text)).encode()).hexdigest()[:22]
    margin = said.margin if said.margin is not None and said.margin < float("inf") else None
    return {
        "question_id": question.id,
        "prompt": question.text,
        "text": said.text,
        "answer_id": short,
        "model_id": model,
        "metadata": {"margin": margin, "tokens": said.tokens},
        **question.row,
    }


def _whole_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file that a killed process may have left in the midst of a line."""
    for line in path.read_bytes().split(b"\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and {"question_id", "prompt", "text"} <= row.keys():
            yield row


def _note(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); remove {path.parent} to ask anew") from error


def _compare(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """ValueError that names what differs. Where a model lies is no difference; what it is, is."""
    keys = [key for key in {**before, **now} if key != "model" and before.get(key) != now.get(key)]
    if not keys:
        return
    differs = "; ".join(f"{key} was {before.get(key)!r}, now {now.get(key)!r}" for key in keys)
    models = f" (answered by {before.get('model')}, now {now.get('model')})" if "weights" in keys else ""
    raise ValueError(
        f"{folder}: holds answers of another evaluation: {differs}{models}; give another --out, or remove it"
    )


def questions_hash(questions: Sequence[Question]) -> str:
    """What is asked, in which order, about pictures of which names."""
    digest = hashlib.sha256()
    for one in questions:
        names = [Path(picture.path).name or picture.name for picture in one.images]
        digest.update(json.dumps([str(one.id), one.text, names]).encode())
    return digest.hexdigest()[:16]


def weights_hash(model: str | Path) -> str:
    """A model's files: names, sizes and a sample of the bytes of its weights and of what else it says of itself."""
    place = hub.resolve(model, "model")
    paths = [place] if place.is_file() else sorted(_files(place))
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.relative_to(place) if path != place else path.name} {path.stat().st_size}\n".encode())
        digest.update(_sample(path))
    return digest.hexdigest()[:16]


def _files(folder: Path) -> Iterator[Path]:
    """Weights at any depth, and what lies beside them at the top."""
    for path in folder.rglob("*"):
        own = path.parent == folder and path.suffix in _SAYS
        if path.is_file() and (own or path.suffix in _WEIGHTS):
            yield path


def _sample(path: Path) -> bytes:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= _BLOCK * _BLOCKS:
            return file.read()
        found = []
        for block in range(_BLOCKS):
            file.seek(block * (size - _BLOCK) // (_BLOCKS - 1))
            found.append(file.read(_BLOCK))
        return b"".join(found)
