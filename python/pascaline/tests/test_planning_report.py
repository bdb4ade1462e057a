"""What people see of a plan: table, bar, formulas and picture."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest
from pascaline.errors import MissingError
from pascaline.planning import Plan, make_plan, nearest_fits, refusal, table
from pascaline.planning.picture import WIDTH, Words, drawing, pieces, rendered, svg
from pascaline.planning.plan_text import BAR_WIDTH, bar, choices_table, explanation, sweep_table
from pascaline.planning.search import optimize, sweep
from support.planning import LLAMA_2_7B, LLAMA_3_8B, P4, request

FITS = make_plan(LLAMA_2_7B, P4, request(mem_fraction_static=0.9))
TOO_LARGE = make_plan(LLAMA_3_8B, P4, request(context_length=65536))
SHARED = make_plan(LLAMA_2_7B, P4, request(used_bytes=256 << 20))
TINY_CARD = make_plan(LLAMA_2_7B, P4, request(card_bytes=1))


class TestTable:
    def test_the_guides_table(self) -> None:
        """Row 7 of the guide, corrected: every line, and their sum."""
        assert table(FITS).splitlines()[:18] == [
            "llama-2-7b on tesla-p4: sglang, context 4,096, 4 requests, KV fp16, chunk 512",
            "",
            "  W weights              3,890.7 MiB  exact",
            "  K KV cache             2,513.0 MiB  exact",
            "  t tables                   2.2 MiB  exact",
            "  r allocator rounding     173.8 MiB  estimated",
            "  a activations             66.2 MiB  estimated",
            "  l logits                   3.2 MiB  estimated",
            "  g CUDA graphs             52.0 MiB  measured",
            "  c CUDA context           300.0 MiB  estimated",
            "  b libraries               64.0 MiB  estimated",
            "  f fragmentation          240.0 MiB  measured",
            "    together             7,305.1 MiB",
            "    the card has         7,611.0 MiB",
            "    headroom               305.9 MiB",
            "",
            "  [WWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWKKKKKKKKKKKKKKKKKKKKKracccff...]",
            "",
        ]

    def test_what_others_use_is_a_line(self) -> None:
        assert "  x used by others         256.0 MiB" in table(SHARED)

    def test_a_refusal_ends_in_what_would_fit(self) -> None:
        text = refusal(TOO_LARGE, nearest_fits(LLAMA_3_8B, P4, TOO_LARGE.request))
        assert f"does not fit: {TOO_LARGE.reasons[0]}" in text
        assert "nearest that fit:\n  1. " in text
        assert "expected speed" not in text

    def test_a_refusal_without_a_way_out(self) -> None:
        assert refusal(TINY_CARD, []).endswith("nothing near fits: a smaller model or a larger card is needed")

    def test_every_formula_is_explained(self) -> None:
        text = explanation(FITS)
        assert all(f"{part.name}: {part.n_bytes:,} B" in text for part in FITS.parts)
        assert "(5,025 tokens + 1 of padding) x 524,288 B; one token: 32 layers x 32 KV heads x (2 x 128 x 2 B)" in text

    def test_tables_have_a_line_for_each(self) -> None:
        plans = sweep(LLAMA_2_7B, P4, request(), "quant")
        assert len(sweep_table(plans, "quant").splitlines()) == 1 + len(plans)
        choices = optimize(LLAMA_2_7B, P4, request(), "throughput", 0.2)
        assert len(choices_table(choices).splitlines()) == 1 + len(choices)


class TestBar:
    @pytest.mark.parametrize("plan", [FITS, TOO_LARGE, SHARED, TINY_CARD])
    def test_it_has_its_width(self, plan: Plan) -> None:
        assert len(bar(plan)) == BAR_WIDTH

    def test_letters_are_shares(self) -> None:
        text = bar(FITS, 1000)
        assert text.count("W") == round(1000 * FITS.weights_bytes / FITS.card_bytes)
        assert text.count(".") == 1000 - round(1000 * FITS.total_bytes / FITS.card_bytes)

    def test_what_exceeds_the_card_is_marked(self) -> None:
        text = bar(TOO_LARGE, 1000)
        assert text.count("!") == 1000 - round(1000 * TOO_LARGE.card_bytes / TOO_LARGE.total_bytes)
        assert text.endswith("!")


class TestPicture:
    @pytest.mark.parametrize("plan", [FITS, TOO_LARGE, SHARED, TINY_CARD])
    def test_every_text_is_inside(self, plan: Plan) -> None:
        for shape in drawing(plan).shapes:
            if isinstance(shape, Words):
                length = 8 * len(shape.text)
                left = shape.x - length if shape.anchor == "end" else shape.x
                assert left >= 0, shape
                assert left + length <= WIDTH, shape

    @pytest.mark.parametrize("plan", [FITS, TOO_LARGE, SHARED])
    def test_it_is_well_formed_and_complete(self, plan: Plan) -> None:
        root = ElementTree.fromstring(svg(plan))
        texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
        for piece in pieces(plan):
            assert texts[texts.index(piece.name) + 1] == f"{piece.n_bytes / 2**20:,.1f} MiB"
        assert any(text and text.startswith("the card has 7,611 MiB") for text in texts)

    def test_pieces_fill_the_card(self) -> None:
        assert sum(piece.n_bytes for piece in pieces(FITS)) == FITS.card_bytes
        assert sum(piece.n_bytes for piece in pieces(SHARED)) == SHARED.card_bytes

    def test_a_png_without_words_is_never_written(self) -> None:
        """resvg leaves out words that it has no font for."""
        with pytest.raises(MissingError) as caught:
            rendered(svg(FITS), fonts=False)
        message = "--picture: PNG needs a font, and this host has none; install DejaVu Sans, or write .svg"
        assert str(caught.value) == message

    def test_names_are_escaped(self) -> None:
        assert "&lt;b&gt;" in svg(replace(FITS, model="<b>"))
