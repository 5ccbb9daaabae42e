"""Finding the files of a data set by their names, in whichever of the usual ways they lie."""

import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import TypeVar

from infra.errors import TesseraError
from infra.store import open_store
from infra.walking import walk
from preprocessing.files import S3, File, is_litter, list_zip

_HINTS = 3
"""Of what is near to a missing name, so many are named."""
_COMPARED = 1000
"""Names beside it that are compared with it."""
_SEEN = 300_000
"""Names that are looked at, at most: somebody may ask for /."""
Found = TypeVar("Found")


class Tree:
    """A data set: a folder, where what zips hold counts as if they were unpacked, or what is below a URL of a store.

    A store is listed once, at the start; all that is asked here afterwards costs no request. What is not where it is
    looked for is taken from one folder deeper, as of a zip that was made of the folder itself, if only one place has
    it; all else is then looked for there too. Of names that differ in their Unicode form each stands for the other.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = open_store(str(root)).url
        self._tops: list[str] = []
        """Once something was found: what goes before names, nothing or a folder."""
        self._broken: list[str] = []
        self._objects: dict[str, File] | None = None
        problem = ""
        if self.root.startswith(S3):
            listing = open_store(self.root).list()
            self._objects = {entry.key: File(f"{self.root}/{entry.key}", listed=entry.size) for entry in listing}
            problem = "" if self._objects else "not found"
        else:
            with _telling(folder := Path(self.root)):
                if not folder.is_dir():
                    problem = "it is no folder" if folder.exists() else "not found"
        if problem:
            raise TesseraError(f"{self.root}: {problem} (expected the folder of a data set)")

    def file(self, *names: str) -> File | None:
        """The first file of these names relative to the root; what lies on disk comes before what lies in zips."""
        return next(self._found(self._file, names), None)

    def folder(self, *names: str) -> "Folder | None":
        """The first folder of these names: on disk or the store, inside a zip at the root, or as `<name>.zip`.

        One without files, or with litter alone, only if there is no other.
        """
        empty = None
        for found in self._found(self._folder, names):
            if not all(map(is_litter, found.files)):
                return found
            empty = empty or found
        return empty

    def missing(self, name: str, *others: str, expected: str) -> TesseraError:
        """The error for names of which none is there; tells what is near, and of zips that were not looked into."""
        nor = f", nor {' nor '.join(others)}" if others else ""
        near = dict.fromkeys(path for each in (name, *others) for path in self._near(each))
        told = [self._told(path) for path in islice(near, _HINTS)] + self._broken[:_HINTS]
        zips = [
            path
            for path in self._places
            if path.lower().endswith(".zip") and (self._objects is not None or "/" in path)
        ]
        if zips:
            why = "must be unpacked, zips are read from disks only" if self._objects else "is not looked into there"
            told.append(f"{', '.join(zips[:_HINTS])} {why}")
        text = "".join(f"; {each}" for each in told)
        return TesseraError(f"{self.root}/{name}: not found{nor} (expected {expected} under {self.root}){text}")

    def _file(self, name: str) -> File | None:
        if self._objects is not None:
            return self._objects.get(name)
        path = Path(self.root, name)
        with _telling(path):
            return File(str(path)) if path.is_file() else self._members.get(name)

    def _folder(self, name: str) -> "Folder | None":
        path = f"{self.root}/{name}"
        if self._objects is not None:
            inside = _below(name, self._objects)
            return Folder(path, inside) if inside else None
        with _telling(there := Path(path)):
            if there.is_dir():
                return Folder.on_disk(path)
        inside = _below(name, self._members)
        if inside:
            return Folder(path, inside)
        archive = self._file(f"{name}.zip")
        if archive is None:
            return None
        members = {member.inside.removeprefix(f"{archive.inside}/"): member for member in list_zip(archive)}
        return Folder(str(archive), _below(Path(name).name, members) or members)

    def _found(self, find: Callable[[str], Found | None], names: Iterable[str]) -> Iterator[Found]:
        """What `find` has under these names; at last in another Unicode form or one folder deeper, if one place has."""
        names = [*names]
        for path in (f"{top}{name}" for name in names for top in self._tops or [""]):
            if (found := find(path)) is not None:
                self._tops = self._tops or [""]
                yield found
        for name in names:
            zipped = (path.removesuffix(".zip") for path in self._alike(f"{name}.zip", nfc))
            places = [path for path in {*self._alike(name, nfc), *zipped} if self._may_be(path, name)]
            there = [(path, found) for path in places if (found := find(path)) is not None]
            if len(there) == 1:
                (path, found) = there[0]
                self._tops = self._tops or ["", path[: path.find("/") + 1] if path.count("/") > name.count("/") else ""]
                yield found
                return

    def _may_be(self, path: str, name: str) -> bool:
        if self._tops:
            return nfc(path) in {nfc(f"{top}{name}") for top in self._tops}
        return path.count("/") <= name.count("/") + 1

    def _near(self, name: str) -> list[str]:
        """Places that are probably meant: of that name elsewhere, in another case, or of a similar one beside it."""
        same = self._alike(name, _caseless)
        if same:
            return same
        wanted, suffix = _caseless(name), PurePosixPath(name).suffix
        parent, _, last = wanted.rpartition("/")
        beside = (
            path
            for path in self._places
            if PurePosixPath(path).suffix == suffix and f"/{_caseless(path)}".rpartition("/")[0].endswith(parent)
        )
        by_last = {_caseless(path).rpartition("/")[2]: path for path in islice(beside, _COMPARED)}
        return [by_last[close] for close in get_close_matches(last, by_last, _HINTS)]

    def _alike(self, name: str, form: Callable[[str], str]) -> list[str]:
        """The places that are, or end with, this name, both brought to a form."""
        wanted = f"/{form(name)}"
        return [path for path in self._places if f"/{form(path)}".endswith(wanted)]

    def _told(self, path: str) -> str:
        within = next((m for key, m in self._members.items() if f"{key}/".startswith(f"{path}/")), None)
        return f"{Path(within.path).name} has {path}" if within else f"there is {path}"

    @cached_property
    def _places(self) -> list[str]:
        """Files and folders of the set by name; of very many on disk the nearest ones."""
        if self._objects is not None:
            files: Iterable[str] = self._objects
        else:
            files = {*self._members, *(each.name for each in islice(walk(Path(self.root)), _SEEN) if each.status)}
        found = {*files}
        for name in files:
            while (name := name.rpartition("/")[0]) and name not in found:
                found.add(name)
        return sorted(found)

    @cached_property
    def _members(self) -> dict[str, File]:
        """What the zips at the root hold, by name."""
        found: dict[str, File] = {}
        if self._objects is None:
            names = sorted((p for p in Path(self.root).iterdir() if p.suffix.lower() == ".zip"), reverse=True)
            for path in names:  # of two of one name the first archive's wins
                try:
                    found |= {member.inside: member for member in list_zip(File(str(path)))}
                except TesseraError as error:  # perhaps one that nobody needs, half downloaded
                    self._broken.append(str(error))
        return found


@dataclass(frozen=True)
class Folder:
    """Files by their name relative to the folder, below it at any depth."""

    path: str
    files: dict[str, File]
    faults: tuple[str, ...] = ()
    """What in it could not be listed, and why: a sentence each."""

    @classmethod
    def on_disk(cls, path: str) -> "Folder":
        """What lies there now; nothing if there is no such folder."""
        found = [*walk(Path(path))]
        faults = tuple(f"{path}/{each.name} cannot be listed ({each.fault})" for each in found if each.fault)
        return cls(path, {each.name: File(f"{path}/{each.name}") for each in found if each.status}, faults)

    def file(self, name: str, suffix: str = "") -> File:
        """The file of this name; where there is none, one that cannot be read and says so, and what is there instead.

        a//b is a/b. A name may be in another Unicode form, and may begin with the folder's own (`val2017/1.jpg` in
        val2017). Where all files lie in folders, their last part is enough if one alone has it. suffix, as ".png": what
        the name may have ended with.
        """
        found = self._find(name)
        if found is None and suffix and PurePosixPath(name).name:
            found = self._find(str(PurePosixPath(name).with_suffix(suffix)))
        return found or File(f"{self.path}/{name}", fault=self._instead(name))

    def _find(self, name: str) -> File | None:
        if name in self.files:
            return self.files[name]
        path = nfc(PurePosixPath(name).as_posix())
        _, own, below = f"/{path}".rpartition(f"/{nfc(PurePosixPath(self.path).name.removesuffix('.zip'))}/")
        return self._by_form.get(path) or (self._by_form.get(below) if own else None) or self._by_last.get(path)

    def _instead(self, name: str) -> str:
        """Why there is no such file, if that can be told."""
        near = self._by_stem.get(_stem(name), [])
        if near:
            return f"there is none, but there is {', '.join(near[:_HINTS])}"
        return f"there is none; {self.faults[0]}" if self.faults else ""

    @cached_property
    def _by_form(self) -> dict[str, File]:
        return _unambiguous((nfc(name), file) for name, file in self.files.items())

    @cached_property
    def _by_last(self) -> dict[str, File]:
        """By the last part of the name, if all files lie in folders."""
        if any("/" not in name and not name.startswith(".") for name in self.files):
            return {}
        return _unambiguous((nfc(name).rpartition("/")[2], file) for name, file in self.files.items())

    @cached_property
    def _by_stem(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name in self.files:
            found.setdefault(_stem(name), []).append(name)
        return found


def nfc(name: str) -> str:
    """The name with composed accents: macOS writes decomposed ones, most others what they are given."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def _caseless(name: str) -> str:
    return nfc(name).casefold()


def _stem(name: str) -> str:
    return _caseless(PurePosixPath(name).stem)


def _unambiguous(pairs: Iterable[tuple[str, File]]) -> dict[str, File]:
    """By those keys that stand for one file."""
    found: dict[str, File] = {}
    several = set()
    for key, file in pairs:
        if found.setdefault(key, file) is not file:
            several.add(key)
    return {key: file for key, file in found.items() if key not in several}


@contextmanager
def _telling(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TesseraError(f"{path}: cannot be read ({error.strerror or error})") from error


def _below(name: str, files: dict[str, File]) -> dict[str, File]:
    return {path.removeprefix(f"{name}/"): file for path, file in files.items() if path.startswith(f"{name}/")}
