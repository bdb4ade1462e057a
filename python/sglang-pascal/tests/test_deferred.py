"""Modules that are imported when something of theirs is used; a package in a folder, no SGLang."""

from __future__ import annotations

import importlib
import sys

import pytest
from sglang_pascal.deferred import (
    FUNCTION,
    MAPPING,
    DeferredModule,
    DeferringFinder,
    compile_nothing,
    disable_nothing,
)

TABLE = {"shop.prices": {"PRICES": MAPPING, "price": FUNCTION}, "shop.absent": {"x": FUNCTION}}


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A package whose module `prices` says when it is imported; its file."""
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "__init__.py").write_text("")
    path = tmp_path / "shop" / "prices.py"
    path.write_text(
        'import sys\nsys.shop_imports = getattr(sys, "shop_imports", 0) + 1\n'
        'PRICES = {"tea": 2}\nOTHER = 5\ndef price(name, times=1): return PRICES[name] * times\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [DeferringFinder(TABLE), *sys.meta_path])
    monkeypatch.setattr(sys, "shop_imports", 0, raising=False)
    yield path
    for name in [name for name in sys.modules if name.partition(".")[0] == "shop"]:
        del sys.modules[name]


def names() -> tuple:
    """What another module would import by name."""
    module = importlib.import_module("shop.prices")
    return module, module.PRICES, module.price


@pytest.mark.parametrize(
    "use",
    [
        lambda module, prices, price: price("tea", times=2) == 4,
        lambda module, prices, price: prices["tea"] == 2,
        lambda module, prices, price: list(prices) == ["tea"],
        lambda module, prices, price: "milk" not in prices,
        lambda module, prices, price: len(prices) == 1,
        lambda module, prices, price: module.OTHER == 5,
    ],
)
def test_a_module_is_imported_once_when_it_is_used(shop, use):
    found = names()
    assert sys.shop_imports == 0
    assert isinstance(found[0], DeferredModule)
    assert use(*found)
    assert use(*found)
    assert sys.shop_imports == 1
    assert names()[0] is sys.modules["shop.prices"]
    assert not isinstance(sys.modules["shop"].prices, DeferredModule)


def test_a_look_at_a_module_that_every_tool_takes_imports_nothing(shop):
    module, _, price = names()
    assert not hasattr(module, "__wrapped__")
    assert price.__name__ == "price"
    assert sys.shop_imports == 0


def test_a_name_that_is_not_there_is_an_error(shop):
    with pytest.raises(AttributeError, match="no attribute 'missing'"):
        _ = names()[0].missing


def test_a_module_that_is_not_there_is_missing(shop):
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'shop\.absent'"):
        importlib.import_module("shop.absent")


def test_an_import_that_fails_fails_again(shop):
    _, prices, _ = names()
    shop.write_text("raise OSError('broken')")
    for _ in range(2):
        with pytest.raises(OSError, match="broken"):
            len(prices)


@pytest.mark.parametrize("decorator", [compile_nothing, disable_nothing])
def test_decorators_return_the_function(decorator):
    def function() -> int:
        return 1

    assert decorator(function) is function
    assert decorator()(function) is function
    options = {"dynamic": True, "backend": "eager"} if decorator is compile_nothing else {"reason": "none"}
    assert decorator(**options)(function) is function
