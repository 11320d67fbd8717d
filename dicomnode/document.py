"""One YAML file → one checked value, or every problem in it, each with file, line, key, got and expected.

Law: this room knows YAML and pydantic and nothing of what the keys mean.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from dicomnode.errors import ConfigError

MAX_NODES = 100_000
"""Values one file may hold once its aliases are followed; beyond it lies only an alias bomb."""

MAX_BYTES = 4 << 20
"""Of one file; a thousand rules take a tenth of it."""

Step = str | int
ModelT = TypeVar("ModelT", bound="Section")
ValueT = TypeVar("ValueT")

_EXPECTED = {
    "missing": "a value; this key is required",
    "string_type": "text; put it in quotes",
    "model_type": "a mapping of keys",
    "dict_type": "a mapping of keys",
    "tuple_type": "a list",
    "bool_type": "true or false",
}
"""What pydantic says in the words of Python."""


class Section(BaseModel):
    """Base of every checked mapping: frozen, and no key that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False)

    later: ClassVar[frozenset[str]] = frozenset()
    """Keys that the language has and this version does not: refused by name, never ignored."""


class ProblemError(ValueError):
    """What a field's own parser finds wrong, perhaps some steps below the field.

    Attributes
    ----------
    path
        Steps from the field down to the culprit.
    others
        What else is wrong with the same field.
    """

    def __init__(self, path: Sequence[Step], got: object, expected: str) -> None:
        super().__init__(expected)
        self.path, self.got, self.expected = tuple(path), got, expected
        self.others: tuple[ProblemError, ...] = ()


def each_of(attempts: Iterable[Callable[[], ValueT]]) -> list[ValueT]:
    """The results of every attempt.

    Raises
    ------
    ProblemError
        The first that an attempt found, with all the others.
    """
    done, found = [], list[ProblemError]()
    for attempt in attempts:
        try:
            done.append(attempt())
        except ProblemError as problem:
            found += [problem, *problem.others]
    if found:
        found[0].others = tuple(found[1:])
        raise found[0]
    return done


class ConfigProblemsError(ConfigError):
    """Everything wrong with one file; its text has one problem per line.

    Attributes
    ----------
    problems
        At least one, in the order of the file's keys. The error's own `file, key, got, expected` are the first's.
    """

    def __init__(self, problems: Sequence[ConfigError]) -> None:
        first = problems[0]
        super().__init__(first.file, first.key, first.got, first.expected)
        self.args = ("\n".join(str(problem) for problem in problems),)
        self.problems = tuple(problems)


@dataclass(frozen=True)
class Document:
    """A parsed file.

    Attributes
    ----------
    file
        How messages name it.
    values
        The root mapping, plain Python values.
    root
        The same with its line numbers; None for an empty file.
    """

    file: str
    values: Mapping[str, Any]
    root: yaml.Node | None

    def problem(self, path: Sequence[Step], got: object, expected: str) -> ConfigError:
        """One problem at `path`, with its line and dotted key."""
        line = self._line(path)
        file = self.file if line is None else f"{self.file}:{line}"
        return ConfigError(file, self._key(path), shown(got), expected)

    def _line(self, path: Sequence[Step]) -> int | None:
        """Line, from 1, of the deepest step that stands in the file."""
        node, line = self.root, None
        for step in path:
            found: tuple[yaml.Node, yaml.Node] | None = None
            if isinstance(node, yaml.MappingNode):
                found = next(((key, value) for key, value in node.value if key.value == step), None)
            elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
                found = (node.value[step], node.value[step])
            if found is None:
                break
            line, node = found[0].start_mark.line + 1, found[1]
        return line

    def _key(self, path: Sequence[Step]) -> str:
        """Dotted key; a list item that has an id carries it, since people count rules by name."""
        key, value = "", self.values
        for step in path:
            try:
                value = value[step]  # type: ignore[index]  # a step of either kind, on a value of either kind
            except (LookupError, TypeError):
                value = {}
            if isinstance(step, int):
                name = value.get("id") if isinstance(value, Mapping) else None
                key += f"[{step}]" + (f"({name})" if isinstance(name, str) else "")
            else:
                key += f".{step}" if key else step
        return key or "(whole file)"


def read(path: Path) -> str:
    """The text of a file.

    Raises
    ------
    ConfigError
        It cannot be read, is no regular file (of which reading might never end), too large, or not UTF-8.
    """
    try:
        if not path.is_file():
            path.stat()
            raise ConfigError(str(path), "(whole file)", "a folder or device", "a file")
        if (size := path.stat().st_size) > MAX_BYTES:
            raise ConfigError(str(path), "(whole file)", f"{size} bytes", f"{MAX_BYTES} bytes at most")
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(str(path), "(whole file)", error.strerror, "a file that can be read") from None
    except UnicodeDecodeError as error:
        got = f"byte {error.object[error.start]:#04x} at {error.start}"
        raise ConfigError(str(path), "(whole file)", got, "UTF-8 text") from None


def parse(text: str, file: str) -> Document:
    """Parse one YAML mapping; an empty text is an empty mapping.

    Raises
    ------
    ConfigProblemsError
        Not YAML, not a mapping, a key twice or not a word, an alias bomb, nested too deeply, or tagged with
        anything but plain values.
    """
    loader = yaml.SafeLoader(text) if text.isprintable() or _readable(text) else None
    if loader is None:
        raise ConfigProblemsError([ConfigError(file, "(whole file)", "control characters", "text")])
    try:
        root = loader.get_single_node()
        _measure(root, file)
        values = {} if root is None else loader.construct_document(root)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = file if mark is None else f"{file}:{mark.line + 1}"
        raise ConfigProblemsError(
            [ConfigError(where, "(YAML)", error.problem or error.context or "unreadable text", "valid YAML")]
        ) from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigProblemsError([ConfigError(file, "(YAML)", str(error), "valid YAML")]) from None
    except RecursionError:
        raise ConfigProblemsError([ConfigError(file, "(YAML)", "endless nesting", "valid YAML")]) from None
    finally:
        loader.dispose()
    if not isinstance(values, dict):
        raise ConfigProblemsError([ConfigError(file, "(whole file)", shown(values), "a mapping of keys")])
    return Document(file=file, values=values, root=root)


def check(document: Document, model: type[ModelT], *, context: Any = None) -> ModelT:
    """Build `model` from the document.

    Raises
    ------
    ConfigProblemsError
        With every problem that pydantic and the field parsers found.
    """
    try:
        return model.model_validate(document.values, context=context)
    except ValidationError as error:
        problems = [problem for found in error.errors() for problem in _problems(document, model, found)]
        raise ConfigProblemsError(problems) from None


def nearest(word: str, words: Iterable[str]) -> str:
    """`; did you mean 'port'?` for the valid word nearest to `word`, or nothing where none is near."""
    by_lower = {valid.lower(): valid for valid in words}
    found = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return f"; did you mean {by_lower[found[0]]!r}?" if found else ""


def shown(value: object) -> object:
    """`value` as a message may show it: bounded in length, without passwords."""
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple | set):
        return "a list"
    if not isinstance(value, str):
        return value
    without_password = re.sub(r"(://[^:/@\s]*):[^@\s]*@", r"\1:***@", value)
    return without_password if len(without_password) <= 120 else without_password[:119] + "…"


def _readable(text: str) -> bool:
    """Whether PyYAML's reader takes every character."""
    return yaml.reader.Reader.NON_PRINTABLE.search(text) is None


def _measure(root: yaml.Node | None, file: str) -> None:
    """Refuse double keys, keys that are not words, endless aliases and alias bombs, in linear time."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: yaml.Node) -> int:
        if id(node) in open_nodes:
            raise yaml.MarkedYAMLError(problem="an alias to itself", problem_mark=node.start_mark)
        if id(node) not in sizes:
            open_nodes.add(id(node))
            sizes[id(node)] = 1 + sum(size(child) for child in _children(node, file))
            open_nodes.discard(id(node))
        if sizes[id(node)] > MAX_NODES:
            raise yaml.MarkedYAMLError(
                problem=f"more than {MAX_NODES} values once aliases are followed", problem_mark=node.start_mark
            )
        return sizes[id(node)]

    if root is not None:
        size(root)


def _children(node: yaml.Node, file: str) -> list[yaml.Node]:
    if isinstance(node, yaml.SequenceNode):
        return list(node.value)
    if not isinstance(node, yaml.MappingNode):
        return []
    seen: set[str] = set()
    for key, _ in node.value:
        if key.tag == "tag:yaml.org,2002:merge":
            continue
        where = f"{file}:{key.start_mark.line + 1}"
        if key.tag != "tag:yaml.org,2002:str":
            got = key.value if isinstance(key, yaml.ScalarNode) else "a list or mapping"
            raise ConfigProblemsError([ConfigError(where, str(got), got, "a word as key; quote it if it is one")])
        if key.value in seen:
            raise ConfigProblemsError([ConfigError(where, key.value, "the same key twice", "each key once")])
        seen.add(key.value)
    return [value for _, value in node.value]


def _problems(document: Document, model: type[Section], found: Any) -> list[ConfigError]:
    """One pydantic error in our words; several where one field's parser found several."""
    path, cause = tuple(found["loc"]), found.get("ctx", {}).get("error")
    if isinstance(cause, ProblemError):
        return [document.problem((*path, *each.path), each.got, each.expected) for each in (cause, *cause.others)]
    return [_problem(document, model, found, path, cause)]


def _problem(
    document: Document, model: type[Section], found: Any, path: tuple[Step, ...], cause: Exception | None
) -> ConfigError:
    if found["type"] == "extra_forbidden":
        section, word = _section_at(model, path[:-1]), str(path[-1])
        if word in section.later:
            return document.problem(path, word, "no such key: not available in this version")
        words = [field.alias or name for name, field in section.model_fields.items()]
        return document.problem(path, word, f"one of {', '.join(words)}{nearest(word, words)}")
    if found["type"] == "missing":
        return document.problem(path, "nothing", _EXPECTED["missing"])
    expected = str(cause) if cause is not None else found["msg"].removeprefix("Input should be ")
    if found["type"] == "literal_error":
        expected += nearest(str(found["input"]), re.findall(r"'([^']+)'", expected))
    elif found["type"] == "string_pattern_mismatch":
        expected = f"text that matches {found['ctx']['pattern']}"
    return document.problem(path, found["input"], _EXPECTED.get(found["type"], expected))


def _section_at(model: type[Section], path: Sequence[Step]) -> type[Section]:
    """The mapping's model that stands at `path` below `model`."""
    for step in path:
        for name, field in model.model_fields.items():
            if step in (name, field.alias):
                model = _section_in(field.annotation) or model
    return model


def _section_in(annotation: Any) -> type[Section] | None:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for part in get_args(annotation) if (found := _section_in(part))), None)
