"""How the VQA family of scorers rewrites an answer before comparing it: three relatives that are not the same.

`vqa` is the VQA evaluation code's, `evalai` the EvalAI server's (TextVQA, and what LLaVA submits), `vizwiz` VizWiz's.
Their common quirks are kept, because published numbers contain them (evaluation §1):
- A period goes unless a digit follows it (a look-behind was meant and mistyped), and only the first 32 go, because a
  flag was passed where the count belongs.
- A punctuation mark is deleted if a blank stands beside one of its kind, or if digit,digit occurs anywhere in the text;
  else it becomes a blank. `: $ % # & ' *` are no punctuation.
- `none` is 0. `somebody'd` becomes `somebodyd`.
"""

from __future__ import annotations

import functools
import re

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
PERIOD = re.compile(r"\.(?!\d)")
PERIODS_REMOVED = 32
DIGIT_COMMA = re.compile(r"\d,\d")
_NUMBER_WORDS = "zero one two three four five six seven eight nine ten".split()
NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBER_WORDS)}
ARTICLES = frozenset(("a", "an", "the"))
CACHE = 1 << 16  # distinct answers remembered; a benchmark's answers repeat

_CONTRACTED = """
'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've
o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's they'd
they'd've they'll they're they've wasn't we'd've we've weren't what'll what're what's what've when's where'd where's
where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'd've
y'all'll you'd you'd've you'll you're you've
""".split()


def _with_one_apostrophe_missing(words: list[str]) -> dict[str, str]:
    return {word[:i] + word[i + 1 :]: word for word in words for i, letter in enumerate(word) if letter == "'"}


# The official tables: a word with one of its apostrophes missing gets it back. (Theirs have no "lets" and no "shes".)
CONTRACTIONS = _with_one_apostrophe_missing(_CONTRACTED) | {"somebody'd": "somebodyd"}
# VizWiz's copy went through an editor that made back-ticks of apostrophes, in all words but these.
_SPARED = frozenset(("ain't", "aren't", "can't", "could've", "couldn't", "we've", "where's", "who've"))
_SPARED_KEYS = frozenset(("couldn'tve", "hadn'tve"))
VIZWIZ_CONTRACTIONS = {
    (key if key in _SPARED_KEYS else key.replace("'", "`")): (word if word in _SPARED else word.replace("'", "`"))
    for key, word in CONTRACTIONS.items()
}


@functools.lru_cache(CACHE)
def flat(text: str) -> str:
    """Line breaks and tabs as blanks, and none at the ends."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def punctuation(text: str) -> str:
    """Without punctuation and most periods; see the module's quirks."""
    result = text
    squeeze = DIGIT_COMMA.search(text) is not None
    for mark in PUNCTUATION:
        if mark in text:
            delete = squeeze or f"{mark} " in text or f" {mark}" in text
            result = result.replace(mark, "" if delete else " ")
    return PERIOD.sub("", result, count=PERIODS_REMOVED)


def words(text: str, contractions: dict[str, str] = CONTRACTIONS) -> str:
    """Lower case, number words as digits, no articles, contractions with their apostrophes, single blanks."""
    kept = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(contractions.get(word, word) for word in kept if word not in ARTICLES)


@functools.lru_cache(CACHE)
def vqa(text: str) -> str:
    """The VQA evaluation code's rewriting (vqaEval.py: processPunctuation, then processDigitArticle)."""
    return words(punctuation(flat(text)))


@functools.lru_cache(CACHE)
def evalai(text: str) -> str:
    """EvalAI's: lower case, every `,` and `?` deleted and `'s` split off first, so `a,b` is `ab` and `what's` `what 's`."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return words(punctuation(flat(text)))


@functools.lru_cache(CACHE)
def vizwiz(text: str) -> str:
    """VizWiz's: as `vqa`, with back-ticks in most contractions."""
    return words(punctuation(flat(text)), VIZWIZ_CONTRACTIONS)
