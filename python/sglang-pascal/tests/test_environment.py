"""SGLang's getters of variables, parsed once: the same values as its own. Of SGLang only the file of the getters."""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from pathlib import Path

import pytest
from sglang_pascal.environment import keeps_bytes, parsing_once


@pytest.fixture
def environ(monkeypatch):
    """SGLang's module of variables without SGLang, and its getter replaced."""
    folder = Path(importlib.util.find_spec("sglang").submodule_search_locations[0])
    spec = importlib.util.spec_from_file_location("environ_alone", folder / "srt" / "environ.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "environ_alone", module)
    before = dict(os.environ)
    spec.loader.exec_module(module)
    module.EnvField._allow_set_name = True
    yield module
    for name in set(os.environ) - set(before):
        del os.environ[name]
    os.environ.update(before)


def fields(module) -> list:
    return [value for value in vars(module.Envs).values() if isinstance(value, module.EnvField)]


def values(module) -> list:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [field.get() for field in fields(module)]


def test_pythons_environment_is_as_expected():
    assert keeps_bytes()


def test_every_variable_has_the_value_that_sglang_gives(environ):
    for changed in ({}, {field.name: "1" for field in fields(environ)[::3]}, {"SGLANG_CACHE_DIR": "/x"}):
        os.environ.update(changed)
        own = values(environ)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(environ.EnvField, "get", parsing_once(environ.EnvField.get))
            assert values(environ) == own
            assert values(environ) == own, "the second time"


def test_a_change_is_seen_however_it_is_made(environ, monkeypatch):
    monkeypatch.setattr(environ.EnvField, "get", parsing_once(environ.EnvField.get))

    class Envs:
        NUMBER, FLAG, TEXT, TABLE = (
            environ.EnvInt(3),
            environ.EnvBool(False),
            environ.EnvStr(None),
            environ.EnvJSON(None),
        )

    number = Envs.NUMBER
    assert [number.get(), Envs.FLAG.get(), Envs.TEXT.get()] == [3, False, None]
    os.environ["NUMBER"] = "4"
    assert [number.get(), number.get()] == [4, 4]
    number.set(5)
    with number.override(6):
        assert [number.get(), number.get()] == [6, 6]
    assert number.get() == 5
    number.set(None)
    assert [number.get(), number.get()] == [None, None]
    number.clear()
    assert number.get() == 3
    os.environ["TABLE"] = "[1]"
    Envs.TABLE.get().append(2)
    assert Envs.TABLE.get() == [1], "a value that can be changed is made anew"


def test_a_value_that_cannot_be_parsed_is_warned_about_each_time(environ, monkeypatch):
    monkeypatch.setattr(environ.EnvField, "get", parsing_once(environ.EnvField.get))

    class Envs:
        BROKEN = environ.EnvInt(3)

    os.environ["BROKEN"] = "three"
    for _ in range(2):
        with pytest.warns(UserWarning, match="Invalid value for BROKEN"):
            assert Envs.BROKEN.get() == 3
