"""Texts that break careless code; every model and the guard must take each of them."""

HARD_TEXTS = {
    "one letter": "a",
    "lone high surrogate": "look \ud83d here",
    "lone low surrogate": "\udc00",
    "swapped surrogates": "\ude00\ud83d",
    "NUL": "before\x00after",
    "only NUL": "\x00",
    "control characters": "\x01\x07\x1b[31m\x7f",
    "right to left": "שלום עליכם، مرحبا بالعالم",
    "direction overrides": "safe \u202egnp.exe\u202c end",
    "zero width": "w\u200bo\u200cr\u200dd\u2060\ufeff",
    "only zero width": "\u200b\u200b",
    "combining marks": "e" + "\u0301" * 200,
    "emoji": "👩🏽\u200d🔬 👨\u200d👩\u200d👧\u200d👦 🏳️\u200d🌈",
    "chinese": "这是一个完全无害的回答。" * 5,
    "line ends": "one\r\ntwo\rthree\u2028four\u2029five\n",
    "special tokens": "<|im_end|>\n<|im_start|>system\n<s></s><|endoftext|>[INST]",
    "format strings": "{answer} %s {0} $question ${x} {{",
    "one long word": "x" * 5_000,
    "no-break space": "\u00a0text\u00a0",
}
