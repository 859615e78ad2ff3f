"""YAML that somebody else may have written, read within limits: recipes, task files, the config.yaml of a run.

A few hundred bytes of YAML can stand for gigabytes: an alias (`*name`) repeats what its anchor holds, a merge key
(`<<`) copies it, and both may stand in each other. Everything is counted as often as it is repeated, while the text is
read and before any value is made of it.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from mipo_ray.errors import brief

# The largest recipe or task file of this project has 21,000 characters and 500 nodes.
MOST_CHARACTERS = 4_000_000
MOST_NODES = 50_000  # keys, values and items, each as often as aliases repeat it
MOST_DEPTH = 40
MOST_DIGITS = 400  # of one number

# YAML 1.1 reads 1e-5 (no dot) as a string; users mean the number. Quoted, it is a string here too.
_SCIENTIFIC_FLOAT = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$")
_FLOAT = "tag:yaml.org,2002:float"
_TIMESTAMP = "tag:yaml.org,2002:timestamp"
_NUMBERS = ("tag:yaml.org,2002:int", _FLOAT)


class _Loader(yaml.SafeLoader):
    """Reads scientific notation as numbers, and refuses what is larger than the limits above."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._nodes = 0
        self._depth = 0
        self._sizes: dict[int, int] = {}  # by identity of a node: how many nodes it stands for

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            node = self.anchors.get(event.anchor)
            if node is not None and id(node) not in self._sizes:
                raise _refused(f"the alias *{event.anchor:.40} stands inside what it repeats", event)
            self._count(1 if node is None else self._sizes[id(node)], event)
            return super().compose_node(parent, index)
        before = self._nodes
        self._count(1, event)
        self._depth += 1
        if self._depth > MOST_DEPTH:
            raise _refused(f"expected at most {MOST_DEPTH} levels, one inside another", event)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(node, yaml.ScalarNode) and node.tag in _NUMBERS and len(node.value) > MOST_DIGITS:
            raise _refused(f"expected at most {MOST_DIGITS} characters in a number, found {len(node.value)}", event)
        if event.anchor is not None:
            self._sizes[id(node)] = self._nodes - before
        return node

    def _count(self, nodes: int, event: yaml.Event) -> None:
        self._nodes += nodes
        if self._nodes > MOST_NODES:
            raise _refused(
                f"expected at most {MOST_NODES:,} keys and values, those that aliases repeat among them", event
            )


class _Dumper(yaml.SafeDumper):
    """Quotes the strings that `_Loader` would read as numbers, and writes what stands in two places twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


# No field is a date: a run called 2026-01-31 is called so.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _TIMESTAMP]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_FLOAT, _SCIENTIFIC_FLOAT, list("-+.0123456789"))
_Dumper.add_implicit_resolver(_FLOAT, _SCIENTIFIC_FLOAT, list("-+.0123456789"))


def load_yaml(text: str) -> Any:
    """The value of a YAML text, of plain types alone.

    Raises yaml.YAMLError for what is no YAML or is past the limits, ValueError for what begins as a number and is none.
    """
    return parse_yaml(text)[1]


def parse_yaml(text: str) -> tuple[yaml.Node | None, Any]:
    """The outermost node of a YAML text (None: the text holds nothing) and its value; raises as `load_yaml` does."""
    if len(text) > MOST_CHARACTERS:
        raise yaml.YAMLError(f"expected at most {MOST_CHARACTERS:,} characters, found {len(text):,}")
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        return node, None if node is None else loader.construct_document(node)
    except (LookupError, AttributeError) as error:  # a value that does not fit the tag before it: !!bool x
        raise yaml.YAMLError(f"a value that is not of the type of its tag ({brief(error)})") from None
    finally:
        loader.dispose()


def dump_yaml(values: Any) -> str:
    """Values of plain types as YAML that `load_yaml` reads back to equal ones."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _refused(problem: str, event: yaml.Event) -> yaml.YAMLError:
    mark: Any = event.start_mark
    return yaml.composer.ComposerError(None, None, problem, mark)
