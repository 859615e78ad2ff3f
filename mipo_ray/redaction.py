"""What counts as a secret, and its place in whatever is written, shown or sent.

One place for both sides of the rule: a configuration that holds a secret is refused (`secret_in`, `names_secret`), and
a text or a mapping that may hold one all the same, as the errors of libraries and runs of earlier versions may, is
shown without it (`redacted`, `redacted_values`). A secret is known by the URL that it stands in, by the key or variable
that names it, by the form that its service gives it, and by its value where it stands in the environment.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

NOT_SHOWN = "(not shown)"
# Characters of a variable's value that is looked for in texts: a shorter one, or words ("disabled", "not-needed",
# "us-east-1"), stand in many.
SHORTEST_VALUE, SHORTEST_OF_WORDS = 8, 16
_WORDS = re.compile(r"[^\W\d_]+(?:[-_. ][^\W\d_]+)*(?:[-_.]\d)?")

# Every repetition that can begin anywhere in a text is bounded: the time is linear in the length of the text.
_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]{0,19})://(?P<rest>[^\s'\"<>`]+)")
# Schemes in which a name before the host is a container, a login or (hf) a model: no secret without a colon.
_NAME_BEFORE_HOST = frozenset({"abfs", "abfss", "wasb", "wasbs", "az", "ssh", "sftp", "hdfs", "webhdfs", "smb", "hf"})
_PARAMETER = re.compile(r"(?P<name>[?&#;][^=&#;?]+=)(?P<value>[^&#;]+)")
_SECRET_PARAMETER = re.compile(
    r"(?:.*[-_.])?(?:signature|sig|token|credential|password|passwd|pwd|secret|key|apikey|auth|authorization)"
    r"|awsaccesskeyid|googleaccessid",
    re.IGNORECASE,
)

_NAMES = r"api_?key|access_?key(?:_?id)?|secret(?:_?access)?(?:_?key)?|client_?secret|passw(?:or)?d|passphrase"
_NAMES += r"|private_?key|credentials?"
_TOKENS = r"(?:hf|hub|huggingface|auth|access|api|refresh|session|bearer)_?token"
_KEY = re.compile(rf"(?:.*[_.-])?(?:{_NAMES}|authorization|bearer|{_TOKENS})|token|auth", re.IGNORECASE)
# The same in a text, `api_key: VALUE`; without those names that are also words.
_KEYED = re.compile(
    rf"(?P<key>(?:{_NAMES}|{_TOKENS}|authorization)[\"']?\s{{0,9}}[:=]\s{{0,9}}|\bbearer\s{{1,9}})"
    r"(?!\((?:the |not shown))(?P<value>\"[^\"\n]*\"?|'[^'\n]*'?|(?:bearer|basic)\s{1,9}\S+|[^\s,;}\])]+)",
    re.IGNORECASE,
)

# Keys of services that say by their form what they are.
_FORMS = re.compile(
    r"(?<![\w-])(?:hf_[A-Za-z0-9]{20,}|sk-(?=[\w-]*\d)(?=[\w-]*[A-Z])[\w-]{20,}|gh[opsur]_[A-Za-z0-9]{20,}|github_pat_\w{20,}"
    r"|glpat-[\w-]{16,}|xox[abprs]-[\w-]{10,}|(?:AKIA|ASIA)[A-Z0-9]{16}|AIza[\w-]{35}"
    r"|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{10,})"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----(?:[\s\S]*?-----END [A-Z ]*PRIVATE KEY-----|[\s\S]*)"
)

_VARIABLE = re.compile(r".*(?:TOKEN|_KEY|APIKEY|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?)(?:_ID)?", re.IGNORECASE)
_read: set[str] = set()  # variables that this process has read as secrets


def read_secret(variable: str) -> str:
    """The value of a variable of the environment ("" where it is not set), which `redacted` knows from now on."""
    _read.add(variable)
    return os.environ.get(variable, "").strip()


def names_secret(key: object) -> bool:
    """Whether the key of a mapping says that its value is a secret."""
    return isinstance(key, str) and _KEY.fullmatch(key) is not None


def secret_in(text: str) -> str | None:
    """Which secret stands in a text of the configuration, in words for a message; None where there is none."""
    if _URL.sub(_without_credentials, text) != text:
        return "a URL with a user's password or key, or with a signature"
    if _FORMS.search(text):
        return "what looks like the key of a service"
    for variable, value in _secrets_of_environment().items():
        if value in text:
            return f"the value of the environment variable {variable}"
    return None


def redacted(text: str) -> str:
    """The text without the secrets that may stand in it."""
    return _redacted(text, _secrets_of_environment())


def _redacted(text: str, environment: Mapping[str, str]) -> str:
    for variable, value in environment.items():
        text = text.replace(value, f"(the value of {variable})")
    text = _URL.sub(_without_credentials, text)
    text = _FORMS.sub(NOT_SHOWN, text)
    return _KEYED.sub(rf"\g<key>{NOT_SHOWN}", text)


def redacted_values(value: Any) -> Any:
    """A value of plain types without secrets: those that a key names, and those in its texts."""
    environment = _secrets_of_environment()

    def shown(part: Any) -> Any:
        if isinstance(part, str):
            return _redacted(part, environment)
        if isinstance(part, Mapping):
            return {
                key: NOT_SHOWN if names_secret(key) and holds_text(below) else shown(below)
                for key, below in part.items()
            }
        return type(part)(map(shown, part)) if type(part) in (list, tuple) else part

    return shown(value)


def holds_text(value: Any) -> bool:
    """Whether a value is, or has in it, a text that is not blank: only that can be a secret."""
    if isinstance(value, Mapping):
        return any(map(holds_text, value.values()))
    if isinstance(value, list | tuple):
        return any(map(holds_text, value))
    return isinstance(value, str) and bool(value.strip())


def _without_credentials(found: re.Match[str]) -> str:
    """A URL without user and password, and without the values of parameters that are secrets."""
    scheme, rest = found["scheme"], found["rest"]
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    _, _, host = authority.rpartition("@")
    user = authority[: -len(host) - 1] if host != authority else ""
    if user and (":" in user or scheme.lower() not in _NAME_BEFORE_HOST):
        rest = f"{NOT_SHOWN}@{rest[len(user) + 1 :]}"
    elif not user and "@" in rest and re.search(r":(?!\d*$)", authority.rpartition("]")[2]):
        rest = f"{NOT_SHOWN}@{rest.rpartition('@')[2]}"  # a slash in the password: s3://KEY:ab/cd@bucket
    rest = _PARAMETER.sub(
        lambda one: f"{one['name']}{NOT_SHOWN}" if _SECRET_PARAMETER.fullmatch(unquote(one["name"][1:-1])) else one[0],
        rest,
    )
    return f"{scheme}://{rest}"


def _secrets_of_environment() -> dict[str, str]:
    """Variables of this process that hold secrets, by their names or because they were read as such -> value, the
    longest first."""
    found = {
        name: value.strip()
        for name, value in os.environ.items()
        if len(value.strip()) >= (SHORTEST_OF_WORDS if _WORDS.fullmatch(value.strip()) else SHORTEST_VALUE)
        and (name in _read or (_VARIABLE.fullmatch(name) and not value.startswith(("/", "file:"))))  # names a file
    }
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))
