"""Texts that take tokenizers apart."""

from __future__ import annotations

from typing import Final

NASTY: Final = (
    "",
    " ",
    "   leading and trailing   ",
    "tabs\tand\nnew\r\nlines\n\n\n",
    "\n \n\t\n  x",
    "don't can't I'LL we've 'sound 'S",
    "1234567890 3.14 0x7f 1,000,000 12345",
    "caf\u00e9 na\u00efve \u212b",
    "e\u0301 and \u1e9b\u0323",
    "\u4f60\u597d\uff0c\u4e16\u754c \u3053\u3093\u306b\u3061\u306f \uc548\ub155",
    "\U0001f469\u200d\U0001f680 \U0001f1eb\U0001f1f7 \u2764\ufe0f",
    "<|im_start|>user\nhi<|im_end|>\n",
    "<|im_start|><|im_start|>",
    "a <tool> b<tool>c  <tool>  d",
    "<s>hello</s> <unk> <pad> <s>",
    "def f(x):\n    return x**2  # comment\n",
    "HelloWorld camelCase XMLHttpRequest \u00dcber\u00c4rger",
    "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd \u0928\u092e\u0938\u094d\u0924\u0947 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "\x00\x01\x7f\ufffd",
    "\u00a0non\u00a0breaking\u2003em\u3000ideographic\u0085next",
    "\u0661\u0662\u0663 \u00bd \u2167 x\u00b2",
    "\u2581already\u2581escaped \u2581",
    "<0x41><0xFF> [UNUSED] <unused0>",
    "a" * 60,
    "ababababcabcabcabc",
    "!?!?!?... --- *** $5 <=> ^~|+ http://x.y/z?a=b&c=d",
    "the thing in the other thing therein",
    "snake_case __init__ a_b__c",
)
"""Spaces, digits, contractions, composed characters, scripts without spaces, emoji, and texts of special tokens."""
