"""What a row says about the forms it mentions: glosses and parts of speech, extracted from its English prose.

    facts = extractfacts_by_key(row)                   # row annotated with lexemes
    facts.glosses                                # (("tâlo", "to gather"), ...), an invented word as are all in these comments

A row names forms (``row.lexemes``), quotes glosses and mentions parts of speech. Each text becomes a line in which a
form is one placeholder, a gloss another and a part of speech a third: ``"tâlo" is a verb meaning "to gather"`` is
``F is a P meaning G``. Whether F and G belong together then depends on the words between two neighbours, and on a few
before and after them. Only constructions that state a meaning count; hints (suggests, implies, relates to) do not,
since a linguist reads the result and a wrong gloss costs more than a missing one. In the order in which they are tried:

1. F and G side by side: ``F means G``, ``F (G)``, ``F (to gather)``, ``G (F)``, ``G is F``, ``F, a P meaning G``,
   ``for G, use F``, ``F and F mean G and G, respectively``;
2. the sentence after: ``You would use F. This P means G.``, if one form alone can be meant;
3. the answer to the question: ``How do you say G?`` with one gloss, answered with one new form that has no gloss yet;
   ``What does F mean?`` answered with a gloss.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import pairwise

from stoney_rl.data import Row
from stoney_rl.lexemes import english_test, quoted_forms
from stoney_rl.text import fold as fold_text
from stoney_rl.text import normalize, words

fold = lru_cache(maxsize=1 << 16)(fold_text)  # the same forms and glosses come again in many rows

MAX_CHARACTERS = 8000  # of a question or an answer: what comes later in so long a text is not read for glosses
MAX_GLOSS_WORDS = 18
MAX_UNQUOTED_WORDS = 8

# Placeholders of a form, a gloss and a part of speech: private use, so no text in any language holds them on purpose.
F, G, P = "\ue000", "\ue001", "\ue002"
_PLACEHOLDERS = re.compile(f"[{F}{G}{P}]")
_MARKS = "`\"'“”*"
_PUNCTUATION = ".,;:!?"


@dataclass(frozen=True, slots=True)
class RowFacts:
    """What one row says: ``forms`` as spelled in it, ``glosses`` as (form, gloss), ``pos`` as (form, part of speech).

    Each form, pair and label stands once, by ``text.fold``, in order of appearance.
    """

    forms: tuple[str, ...]
    glosses: tuple[tuple[str, str], ...]
    pos: tuple[tuple[str, str], ...]


# Parts of speech, as the rows name them: a head and the modifiers before it. A label is lower case and singular.
_POS_HEAD = re.compile(  # of lower-cased text: to ignore case costs twice the time
    r"\b(?:noun(?: phrase| quantifier)?|verb(?: phrase| quantifier)?|adverb(?:ial)?(?: phrase)?|adjective(?: phrase)?"
    r"|adjectival phrase|(?:pre|post)position(?:al phrase)?|pronoun|proper name|interjection|conjunction"
    r"|particle|numeral"
    r"|quantifier|demonstrative|determiner|interrogative|exclamation)s?\b"
)
_POS_MODIFIERS = frozenset(
    """
    alienable inalienable proper common compound collective possessed kinship active stative impersonal reflexive
    reciprocal causative auxiliary modal positional copular transitive intransitive ditransitive locative temporal
    demonstrative personal possessive interrogative indefinite adverbial verbal question discourse
    """.split()  # noqa: SIM905
)
# 'Phrase' is a class of its own only where a form is said to be one; 'the phrase F' just names it.
_PHRASE = re.compile(r"\b(?:is|as) an? (?:simple |single )?['\"]?(phrase)\b(?! for)")
_LAST_WORD = re.compile(r"([a-z]+)[ -]$")
# A quoted span of these words alone speaks of grammar and glosses nothing.
_GRAMMAR = frozenset(
    """
    transitive intransitive ditransitive alienable inalienable stative active impersonal noun nouns verb verbs adverb
    adverbs adjective adjectives phrase pronoun conjunction interjection preposition postposition particle prefix suffix
    infix affix morpheme capitalized capitalised lowercase uppercase plural singular stem root form forms grammatical
    classification grammatical_classification literally lit pronounced e.g i.e eg ie meaning first-person second-person
    third-person quantifier hyphen etc
    """.split()  # noqa: SIM905
)
_NO_GLOSS_START = frozenset(
    """
    that it this these those there you they he she we if whether how what which who whose both same different exactly
    something's like as when where because see such used listed also not nothing more less implied implying indicating
    referring describing specifically generally typically usually e.g i.e another other
    """.split()  # noqa: SIM905
)

# Pieces of the patterns. All of them are matched against the text between two placeholders, or beside one.
_NOUNS = (
    r"(?:(?:word|term|phrase|expression|form|entry|name|translation|equivalent|rendering|counterpart|option|choice"
    r"|concept|idiom|locative|classifier)s?|entries)"
)
_PARENTHESIS = r"(?:\s*\([^()]*\))?"
_ADVERBS = (
    r"(?:(?:(?!likely|possib|probab|potential|seeming|suppos|apparent|presum)\w+ly|also|both|each|all|then|itself|alone"
    r"|by itself|here|just|can|would|best|most|in turn|more|often|itself,)\s+)*"
)
# Words that may stand between a verb of meaning and the gloss, or between a verb of saying and the form.
_FILLERS = (
    r"(?:(?:an?|the|this|that|of|for|to|as|being|specific|general|broader|broad|basic|simple|single|direct"
    r"|common|proper"
    r"|distinct|precise|exact|following|more|most|correct|appropriate|appropriately|suitable|valid|physical"
    r"|actual|particular"
    r"|different|descriptive|traditional|culturally|action|act|state|process|concept|idea|notion|condition|quality"
    r"|feeling|sense|or|property|event|sound|substance|object|place|person|someone|who|is|something|somewhat|like|"
    rf"either|both|stoney|nakoda|english|invented|language|meaning|name|called|\w+ly|{P}|{_NOUNS})[\s,:]+)*?"
)
_MEANS = (
    r"(?:means?|meaning|refer(?:s|ring)?(?: \w+ly)? to|translat(?:es?|ing)(?: \w+ly)?(?: back)? (?:to|as|into)"
    r"|denot(?:es?|ing)|signif(?:y|ies|ying)|designat(?:es?|ing)|stands? for|describ(?:es?|ing)|represent(?:s|ing)?"
    r"|express(?:es|ing)?|convey(?:s|ing)?|corresponds?(?: \w+ly)? to"
    r"|(?:is|are|can be|could be) (?:\w+ly )?(?:translated|defined|glossed|rendered|listed|given|understood|explained)"
    r"(?: \w+ly)? (?:as|to|by)"
    r"|(?:is|are) glossed"
    r"|(?:has|have|with|carries)(?: \w+){0,3} (?:meaning|translation|gloss)(?:es|s)?(?: of)?:?"
    r"|(?:is|are|was|used) (?:\w+ly )?(?:used )?(?:for|to (?:mean|say|express|describe|refer to|denote|convey"
    r"|indicate)))"
)
_IS_A = (
    r"(?:is|are|was|counts? as|acts?(?: \w+ly)? as|functions?(?: \w+ly)? as|serves?(?: \w+ly)? as"
    r"|(?:is|are) (?:\w+ly |both |also |each )?(?:classified|categorized|categorised|listed|marked|identified"
    r"|labell?ed|described|tagged"
    r"|given|considered|noted|treated|designated|presented|used|defined)(?: as)?)"
)
_KIND = (
    r"(?:stoney|nakoda|invented|single|simple|general|specific|basic|base|core|valid|descriptive|common|regular|more"
    r"|direct|different)"
)
_A_KIND = rf"{_ADVERBS}(?:both |either |being |the |an? )*(?:{_KIND} )*"

_GLUE = re.compile(r"-?\s*(?:[,;/]|,?\s*(?:and/or|and|or|as well as|&))\s*(?:also |an? |the |either )?")

_F_PARENTHESIS_G = re.compile(
    rf"-?\s*\((?:(?:an? )?{P}[,:;]?\s*)?(?:literally|lit\.|meaning|which means|i\.e\.,?|glossed as|for"
    rf"|or)?[:,]?\s*(?:an? |the )?"
)
_F_MEANS_G = re.compile(
    rf"-?{_PARENTHESIS}\s*,?\s*(?:(?:which|that|it)\s+)?"
    rf"(?:{_IS_A} {_A_KIND}(?:(?!not\b)[a-z-]+\s+){{0,2}}?(?:{P}|{_NOUNS})\s*,?\s*(?:(?:that|which|and|but)\s+)?"
    r"|(?:and|but)\s+)?"
    rf"{_ADVERBS}(?:(?:is|are) listed )?(?:{_MEANS}|says?),?\s+"
    rf"(?:an? (?:[a-z-]+ )?[a-z-]+,\s+)?{_FILLERS}",
    re.IGNORECASE,
)
# An apposition describes the form before it, whatever that form does in the sentence: '... F, a P meaning G'.
_F_APPOSITION_G = re.compile(
    rf"-?{_PARENTHESIS},\s*(?:which is )?(?:an?|the) (?:{_KIND} )*(?:{P}|{_NOUNS})\s*,?\s*"
    rf"(?:(?:that|which)\s+)?(?:{_MEANS}|for)\s+{_FILLERS}",
    re.IGNORECASE,
)
_F_COMMA_G = re.compile(r"-?,\s*")
_WITH_F_G = re.compile(
    r"-?,?\s*(?:on the other hand,\s*)?(?:(?:a speaker|speakers|one|you|people) (?:says?|express(?:es)?|means?"
    r"|refers? to)"
    r"|the meaning is)\s+"
)
_WITH_BEFORE = re.compile(r"\b[Ww]ith\s+$")
_ITS_MEANING_AFTER = re.compile(r"\s*(?:is|as) (?:its|the) (?:\w+ )?(?:meaning|gloss|translation)\b")
_F_IS_A_G = re.compile(
    rf"-?{_PARENTHESIS}\s*,?\s*(?:(?:which|that)\s+)?(?:{_IS_A} {_A_KIND}{P}|{_IS_A} {_A_KIND}{_NOUNS}(?= for))"
    rf"(?:\s*\(|[,:]?\s+)(?:for\s+{_FILLERS})?(?:an? |the )?",
    re.IGNORECASE,
)
_F_IS_G = re.compile(rf"-?{_PARENTHESIS}\s+(?:is|are|would be)\s+(?:\w+ly )?(?:an? |the )?", re.IGNORECASE)
_F_FOR_G = re.compile(
    rf"-?{_PARENTHESIS}\s*,?\s*(?:as (?:an? |the )(?:{_KIND} )*(?:{P}|{_NOUNS}) )?"
    rf"(?:for|(?:in order )?to (?:say|mean|express|describe|refer to|denote|convey|indicate))\s+{_FILLERS}",
    re.IGNORECASE,
)
_F_SIGN_G = re.compile(r"-?\s*(?:[:=→]|\s[-–—]|—)\s*")
_F_AS_G = re.compile(r"-?\s+as\s+(?:an? |the |meaning )?")
_F_LATER_MEANS_G = re.compile(
    rf"[^.;?!()]*?(?:(?:,|\bwhich|\bthat|\band)\s+{_ADVERBS}(?:means?|meaning|(?:translates?|translating)(?: \w+ly)? to"
    rf"|stands for|refer(?:s|ring)(?: \w+ly)? to|(?:is|are) (?:\w+ly )?(?:translated|defined|understood) as"
    rf"|(?:is|are) glossed(?: as)?)"
    r"|(?:,|\band)\s+(?:understood|translated|glossed|defined|rendered) as|\bwith the (?:gloss|meaning|sense)(?: of)?"
    rf"|\b(?:it|this (?:{P}|{_NOUNS}))\s+{_ADVERBS}{_MEANS})\s+{_FILLERS}"
    r"|[^.?!()]*?\bin English,? (?:it )?(?:is|means)\s+",
    re.IGNORECASE,
)

_G_PARENTHESIS_F = re.compile(r"\s*\((?:or |e\.g\.,? |in stoney(?: nakoda)?,? |stoney:? )?", re.IGNORECASE)
_G_IS_F = re.compile(
    r"(?:\s+in (?:the )?\w+(?: \w+)?)?,?\s+(?:is|are|was|would be|can be|could be|may be|becomes?)\s+"
    rf"{_ADVERBS}(?:(?:translated|expressed|referred to|rendered|called|known|said|described|conveyed|written|given"
    r"|represented|named|denoted|termed|captured)\s+)?"
    rf"{_ADVERBS}(?:in (?:the )?\w+(?: \w+)? )?(?:(?:as|by|with|using|through|to)\s+)?{_FILLERS}",
    re.IGNORECASE,
)
_G_TRANSLATES_F = re.compile(
    rf"\s+{_ADVERBS}(?:translates?|corresponds?)(?: \w+ly)? (?:to|as|into)\s+{_FILLERS}", re.IGNORECASE
)
_G_SIGN_F = re.compile(r"\s*[:=→]\s*")
_G_AS_F = re.compile(r"\s+as\s+(?:the )?(?:\w+ )?", re.IGNORECASE)
_AS_WORD_FOR_BEFORE = re.compile(rf"\bas (?:an?|the) (?:{_KIND} )*(?:{P}|{_NOUNS}) for\s+$", re.IGNORECASE)
_G_COMMA_F = re.compile(r",\s*")
_G_WHERE_F = re.compile(r"\s+where\s+[^.;?!()]{0,40}?\b(?:has|says|uses)\s+")
_G_USE_F = re.compile(
    rf"(?![^{F}]*\b(?:not|never|no|than|unlike|instead|if)\b)[^.;?!()]{{0,80}}?"
    rf"\b(?:uses?|say|choose|employ|prefer|select|apply|call it|is|are|be)\s+{_FILLERS}",
    re.IGNORECASE,
)
_FOR_BEFORE = re.compile(
    r"\b(?:for|meaning|to (?:say|express|describe|convey|refer to|indicate|state|mean|translate|talk about|name)"
    rf"|say|express|translate)\s+{_FILLERS}$",
    re.IGNORECASE,
)
_SAYING_BEFORE = re.compile(
    r"\b(?:translat\w*|gloss\w*|defin\w*|meaning of|render\w*|express\w*|described?|say|said"
    r"|give[ns]?)(?: \w+){0,4}\s*$",
    re.IGNORECASE,
)
_G_LISTED_F = re.compile(rf"[^.;:?!()]{{0,60}}?\b{_NOUNS}\b(?:\s+[a-z]+){{0,4}}:\s*", re.IGNORECASE)
_G_THEN_F_USED = re.compile(rf"[^.;?!()]{{0,60}}?,\s*{_FILLERS}", re.IGNORECASE)
_USED_AFTER = re.compile(r"-?\s*(?:is|would be|can be|could be|should be|works|applies|fits)\b(?! not)", re.IGNORECASE)
# 'For the basket that starts to G, you would use F': the gloss stands anywhere in what opens the sentence.
_OPENING_BEFORE = re.compile(
    rf"(?:^|[.?!;]\s+|,\s+(?:and|while|but)\s+)(?:(?:However|Conversely|Similarly),\s+)?(?:for|to|when"
    rf"|if)\b[^.;?!{F}{G}]*$",
    re.IGNORECASE,
)
# A form after one of these is not the subject of what follows it: 'the suffix in F means G'.
_NOT_SUBJECT = re.compile(
    r"\b(?:in|of|from|to|with|than|unlike|like|on|by|within|prefix|suffix|element|component|ending|part|morpheme|not)"
    rf"\s+(?:(?:the|this|a|an|{P}|{_NOUNS})\s+)*$",
    re.IGNORECASE,
)
_ASIDE = re.compile(rf"-?{_PARENTHESIS}(?:,\s*which|,?\s*meaning)\b")
_MEANING_OF = re.compile(
    rf"\b(?:translation|meaning|equivalent|gloss|definition|rendering|english)(?: \w+){{0,2}} (?:of"
    rf"|for)(?: (?:the|stoney|nakoda|{P}|invented|{_NOUNS}))*\s*$",
    re.IGNORECASE,
)
_BOTH_BEFORE = re.compile(r"\b(?:both|each|either|that|terms?|words?|verbs?|nouns?|phrases?)\s*$", re.IGNORECASE)
_SINGULAR = re.compile(
    r"\b(?:means|refers|denotes|translates|is|designates|signifies|describes|represents|acts|functions|serves"
    r"|expresses|conveys|corresponds|stands)\b"
)
_PIECE = re.compile(
    r"\b(?:prefix|suffix|affix|element|root|component|ending|morpheme|addition|syllable)", re.IGNORECASE
)
_RESPECTIVELY = re.compile(r"[^.?!]{0,60}\brespectively\b", re.IGNORECASE)

# Glosses without quotes.
_BARE = r"(?P<bare>[A-Za-z][^.,;:?!()\"`“”]*?)"
_F_PARENTHESIS_BARE = re.compile(r"-?\s*\((?:literally |lit\. |meaning )?(?P<bare>[^()]+)\)")
_MEANS_BARE = re.compile(
    rf"(?:means|translates(?: \w+ly)? to|meaning)\s+{_BARE}(?=[.,;?!]|$|\s+(?:while|whereas|but|and {F}))"
)
_F_MEANS_BARE = re.compile(
    rf"-?{_PARENTHESIS}\s*,?\s*(?:(?:which|that)\s+)?(?:is an? (?:{_KIND} )*{P} )?(?:(?:that|which) )?{_ADVERBS}"
    + _MEANS_BARE.pattern
)
_BARE_IS_F = re.compile(
    rf"\b(?:word|term|verb|noun|phrase|expression|translation"
    rf"|{P})\s+for\s+{_BARE}(?:\s+in \w+(?: \w+)?)?\s+is\s+(?:the (?:\w+ )?)?$",
    re.IGNORECASE,
)
_BARE_STOP = re.compile(
    r"\b(?:is|are|was|has|have|that|which|not|this|it|you|would|could|can|these|concept|english|idea|term"
    r"|phrase|word)\b",
    re.IGNORECASE,
)

# The sentence after, about the one form of the sentence before.
_ANAPHOR_MEANS = re.compile(
    rf"(?:(?:This|It|That|The)\s+(?:(?:stoney|nakoda|invented|{_KIND})\s+)*(?:{P}\s+|{_NOUNS}\s+)?)"
    rf"(?:{_IS_A} {_A_KIND}(?:{P}|{_NOUNS})\s*,?\s*(?:(?:that|which|and)\s+)?)?"
    rf"(?:{_ADVERBS}(?:{_MEANS}\s+{_FILLERS}{G}|{_MEANS_BARE.pattern})"
    rf"|[^.;?!{F}{G}]{{0,60}},\s+(?:specifically )?meaning\s+{_FILLERS}{G})"
    rf"|(?:Its|The) (?:english )?(?:meaning|gloss|translation) (?:is|would be)\s+{_FILLERS}{G}",
    re.IGNORECASE,
)
_ANAPHOR_POS = re.compile(
    rf"(?:This\s+(?:(?:stoney|nakoda|invented|{_KIND})\s+)*{P}"
    rf"|(?:[A-Z][^,.;{F}{G}{P}]{{0,40}},\s+)?(?:This|It|The (?:term|word|phrase|form))\s+{_IS_A} {_A_KIND}{P}"
    rf"|(?:As|Being) an? (?:{_KIND} )*{P},\s+(?:it|this)\b"
    rf"|Its (?:grammatical )?classification as an? {P}"
    rf"|(?:The|This|Its) (?:\w+ )?\w+ (?:calls|lists|marks|labels|classifies) (?:it|this \w+)(?: as)? (?:an? )?{P}"
    rf"|(?:This|It)\s+is\s+(?:an?|the)\s+(?:\w+\s+){{0,2}}(?:translation|rendering)\s+(?:of|from|for)\s+(?:the"
    rf"|this|an?)\s+(?:\w+\s+){{0,2}}{P}"
    rf"|(?:This|It)\s+[^{F}{P}.;]{{0,60}} (?:and {_IS_A}|as) an? (?:{_KIND} )*{P})",
    re.IGNORECASE,
)

_SAME_TOPIC = re.compile(r"(?:Its|In it)\b")  # what follows is about a part of the form spoken of

# Parts of speech beside forms.
_POS_PARENTHESES = re.compile(rf"\s*\((?:an? )?{P}\)")
_INNER_PARENTHESES = re.compile(r"\s*\([^()]*\)")
_F_PARENTHESIS_P = re.compile(rf"-?\s*\((?:{G}[,;:]?\s*)?(?:an?\s+|the\s+)?(?:{_KIND}\s+)*")
_F_IS_A_P = re.compile(
    rf"-?\s*,?\s*(?:(?:which|that|it)\s+)?{_ADVERBS}(?:{_IS_A}|(?:classified|categorized|listed|marked|labelled) as"
    r"|which (?:the )?\w+ (?:lists|gives|marks|classifies|labels|glosses) (?:it )?as"
    r"|(?:carries|has|bears|belongs to)(?: \w+){0,5} (?:label|classification|category|class))"
    rf"\s+(?:{_A_KIND}|an?\s+(?:(?!not\b)[a-z-]+\s+){{1,2}})",
    re.IGNORECASE,
)
_F_LATER_P = re.compile(
    rf"[^.;?!]{{0,60}}(?:[,:]\s+an?\s+|\b(?:because|since|as) this\s+|\bit\s+{_IS_A}\s+an?\s+|(?:,"
    rf"|\band)\s+(?:is )?(?:listed|classified|marked|categorized) as (?:an? )?"
    rf"|\bbelongs to [^.;?!]{{0,30}}\bmarked\s+(?:as )?)(?:{_KIND}\s+)*",
    re.IGNORECASE,
)
_CALL_F_P = re.compile(r"-?\s+an?\s+")
_CALL_BEFORE = re.compile(r"\b(?:calls?|called|consider|considered|labels?)\s+$", re.IGNORECASE)
_F_MEANS_G_P = re.compile(
    rf"[^.;?!()]{{0,60}}{G}(?:\s*\((?:an? )?|,?\s+(?:and|which)\s+(?:also\s+)?{_IS_A}\s+{_A_KIND}"
    r"|,?\s+(?:functioning|serving|acting) as (?:an? )?)",
    re.IGNORECASE,
)
_F_ITS_P = re.compile(
    r"[^.;!?]{0,60}\b(?:its (?:grammatical )?(?:classification|label|category|part of speech)(?: as|,|:)?"
    r"|(?:labels|marks|classifies|lists|categorizes) it(?: as)?)\s+(?:an?\s+)?",
    re.IGNORECASE,
)
_F_AS_A_P = re.compile(rf"-?\s+as\s+(?:both\s+|either\s+)?(?:an?\s+|the\s+)?(?:{_KIND}\s+)*", re.IGNORECASE)
_F_COMMA_P = re.compile(rf"-?\s*,\s*an?\s+(?:{_KIND}\s+)*", re.IGNORECASE)
_P_F = re.compile(r"\s+(?:\((?:e\.g\.,? )?|(?:like|such as|including)\s+(?:the\s+)?)?")
_P_COMMA_F = re.compile(r",\s*")
_P_CLASS_F = re.compile(r"(?:['\"]?\s+(?:classification|label|category|marking)(?: \w+)?)?\s+(?:for|of)\s+")
_P_FOR_G_IS_F = re.compile(
    rf"\s+(?:for|meaning|that means|used for|to (?:express|describe|say))\s+(?:[\w-]+\s+){{0,3}}{G}"
    r"(?:(?:\s+in \w+(?: \w+)?)?,?\s+(?:is|are|would be)\s+|:\s*)"
)
_AS_BEFORE = re.compile(rf"\b(?:as|being)\s+(?:an?|the)\s+(?:{_KIND}\s+)*$", re.IGNORECASE)
_CLASS_BEFORE = re.compile(
    r"\b(?:classification|classified|label|category|part of speech|marking)[\s'\"]*(?:of |as )?(?:an? |the )?$",
    re.IGNORECASE,
)
_COMPARED_BEFORE = re.compile(
    r"\b(?:unlike|compared (?:to|with)|contrast (?:to|with)|than|from|not)\s+(?:the\s+)?$", re.IGNORECASE
)
_NEGATED = re.compile(r"\b(?:not|never|rather than|instead of)\b", re.IGNORECASE)

# Questions that ask for a form, or for a meaning.
_ASKS_FORM = re.compile(
    r"\b(?:say|render\w*|offer|use|mean\w*|put|express\w*|translat\w*|call\w*|refer\w*|describ\w*|convey\w*"
    r"|give|what is|which|form|tell"
    rf"|{_NOUNS}|{P})\b|{P}",
    re.IGNORECASE,
)
_CHOICE = re.compile(rf"{F}-?(?: \([^()]*\))?,? (?:or|and)(?: is)? {F}")
_ASKS_MEANING = re.compile(
    r"\b(?:mean\w*|say|read|explain|understand|stand for|express|corresponds?|refer\w*|translat\w*|definition"
    r"|english|gloss)\b",
    re.IGNORECASE,
)
_ANSWERS_MEANING = re.compile(
    rf"(?:(?:It|This|That|They|He|She|You|One)\s+)?(?:{_ADVERBS}(?:{_MEANS}|is|are|(?:is"
    rf"|are) referring to)\s+)?(?:The (?:english )?(?:translation|meaning|equivalent|word) is\s+)?(?:an? |the )?{G}",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.?!]+(?=\s|$)")


@dataclass(slots=True)
class _Item:
    """A placeholder of an encoded text: its kind, where it stands there, and what it stands for."""

    kind: str
    at: int
    value: str


@cache
def _is_english() -> Callable[[str], bool]:
    return english_test(())


def _quoted_spans(text: str) -> list[tuple[int, int]]:
    """(start, end) of each of ``quoted_forms(text)`` in ``text``, without the marks."""
    spans, at = [], 0
    for quoted in quoted_forms(text):
        start = text.find(quoted, at)
        while start > 0 and text[:start].rstrip(" \t.,;:!?…*_~<>")[-1:] not in _MARKS:
            start = text.find(quoted, start + 1)
        if start > 0:
            at = start + len(quoted)
            spans.append((start, at))
    return spans


def _is_word_character(character: str) -> bool:
    return character.isalnum() or "\u0300" <= character <= "\u036f"


def _ends_word(text: str, end: int) -> bool:
    rest = text[end : end + 2]
    return not rest or not (_is_word_character(rest[0]) or (rest[0] == "-" and rest[1:].isalnum()))


def _starts_word(text: str, start: int) -> bool:
    return start == 0 or not (_is_word_character(text[start - 1]) or text[start - 1] == "-")


def _lower(text: str) -> str:
    """``text`` in lower case, position by position. Not case-folded: that makes two characters of ẖ."""
    lowered = text.lower()
    if len(lowered) == len(text):
        return lowered
    return "".join(small if len(small := letter.lower()) == 1 else letter for letter in text)


def _overlaps(start: int, end: int, spans: list[tuple]) -> bool:
    return any(start < span[1] and span[0] < end for span in spans)


def _form_spans(
    text: str, lowered: str, forms: dict[str, str], quoted: list[tuple[int, int]], quoted_keys: set[str]
) -> list[tuple[int, int, str, str]]:
    """(start, end, F, form key) of the forms in ``text``, longest first where they overlap.

    A form of plain ASCII letters may also be an English word: it counts outside quotes only if the row never quotes it,
    and inside them only up to their edges, a bracket or a slash.
    """
    found: list[tuple[int, int, str, str]] = []
    for key in forms:
        start = lowered.find(key)
        while start >= 0:
            end = start + len(key)
            if (
                _starts_word(text, start)
                and _ends_word(text, end)
                and not _overlaps(start, end, found)
                and (not key.isascii() or _may_be(text, start, end, quoted, key in quoted_keys))
            ):
                found.append((start, end + text.startswith("-", end), F, key))
            start = lowered.find(key, end)
    return found


def _may_be(text: str, start: int, end: int, quoted: list[tuple[int, int]], row_quotes_it: bool) -> bool:
    for open_, close in quoted:
        if open_ <= start and end <= close:
            before, after = text[open_:start].rstrip(), text[end:close].removeprefix("-").lstrip()
            return (not before or before[-1] in "()/[]+") and (not after or after[0] in "()/[]+")
    return not row_quotes_it


@lru_cache(maxsize=1 << 16)
def _is_gloss(text: str) -> bool:
    """Whether the span can gloss a form: some words, not all of them grammar, at least half of them English."""
    found = [word.casefold() for word in words(text)]
    if not 1 <= len(found) <= MAX_GLOSS_WORDS or text.startswith("-") or text.endswith("-"):
        return False
    english = sum(map(_is_english(), found))
    return 2 * english >= len(found) and not all(word in _GRAMMAR for word in found)


def _is_bare_gloss(text: str) -> bool:
    """The same for a gloss without quotes: stricter, since nothing marks where it ends."""
    found = [word.casefold() for word in words(text)]
    return (
        _is_gloss(text)
        and not _PLACEHOLDERS.search(text)
        and found[0] not in _NO_GLOSS_START
        and not any(word in _GRAMMAR for word in found)
    )


def _pos_spans(lowered: str) -> list[tuple[int, int]]:
    """(start, end) of the parts of speech that a lower-cased text names, with their modifiers."""
    spans = []
    for match in _POS_HEAD.finditer(lowered):
        start = match.start()
        while (word := _LAST_WORD.search(lowered, max(0, start - 20), start)) and word[1] in _POS_MODIFIERS:
            start = word.start()
        spans.append((start, match.end()))
    spans += [match.span(1) for match in _PHRASE.finditer(lowered)]
    return spans


def normalize_pos(text: str) -> str:
    """A part of speech as the lexicon names it: lower case, singular, one space between words."""
    label = " ".join(text.replace("-", " ").casefold().split())
    return label if label.endswith("ss") else label.removesuffix("s")


def _encode(
    text: str, forms: dict[str, str], quoted: list[tuple[int, int]], quoted_keys: set[str]
) -> tuple[str, list[_Item]]:
    """``text`` with placeholders, and what they stand for. The marks around a placeholder are dropped.

    A full stop inside closing marks is kept where it ends the sentence; ``?`` and ``!`` there belong to the quotation.
    """
    lowered = _lower(text)
    spans = _form_spans(text, lowered, forms, quoted, quoted_keys)
    labels = _pos_spans(lowered)
    for start, end in quoted:
        if (start, end) not in labels and not _overlaps(start, end, spans) and _is_gloss(text[start:end]):
            spans.append((start, end, G, " ".join(text[start:end].split())))
    spans += [(at, to, P, normalize_pos(text[at:to])) for at, to in labels if not _overlaps(at, to, spans)]
    spans.sort()

    pieces: list[str] = []
    items: list[_Item] = []
    length = at = 0
    for start, end, kind, value in spans:
        opening = start
        while opening > at and text[opening - 1] in _MARKS:
            opening -= 1
        closing = end
        while closing < len(text) and text[closing] in _PUNCTUATION:
            closing += 1
        kept = ""
        if opening < start and closing < len(text) and text[closing] in _MARKS:
            inside = text[end:closing]
            while closing < len(text) and text[closing] in _MARKS:
                closing += 1
            rest = text[closing : closing + 2]
            ends = not rest or (rest[0].isspace() and (rest[1:].isupper() or rest[1:] in _MARKS))
            kept = "," if "," in inside else "." if "." in inside and ends else ""
        elif opening < start:
            opening, closing = (opening, end) if kind != P else (start, end)
        else:
            closing = end
        pieces += [text[at:opening], kind, kept]
        items.append(_Item(kind, length + opening - at, value))
        length += opening - at + 1 + len(kept)
        at = closing
    pieces.append(text[at:])
    return "".join(pieces), items


class _Facts:
    """What a row says so far: pairs in order, each once."""

    def __init__(self) -> None:
        self.glosses: dict[tuple[str, str], str] = {}
        self.pos: dict[tuple[str, str], None] = {}

    def gloss(self, key: str, gloss: str) -> None:
        gloss = " ".join(gloss.split()).strip(" ,.;:")
        if gloss and fold(gloss) != key:
            self.glosses.setdefault((key, fold(gloss)), gloss)

    def has_gloss(self, key: str) -> bool:
        return any(form == key for form, _ in self.glosses)


def _groups(encoded: str, items: list[_Item], drop_parentheses: bool = False) -> list[list[_Item]]:
    """Neighbours of one kind that a list joins: ``F, F and F``."""
    groups: list[list[_Item]] = []
    for item in items:
        if groups and groups[-1][-1].kind == item.kind:
            gap = encoded[groups[-1][-1].at + 1 : item.at]
            if "(" in gap:
                gap = (_INNER_PARENTHESES if drop_parentheses else _POS_PARENTHESES).sub("", gap)
            if len(gap) < 20 and _GLUE.fullmatch(gap):
                groups[-1].append(item)
                continue
        groups.append([item])
    return groups


def _subjects(group: list[_Item], gap: str, before: str) -> list[_Item]:
    """Which forms of a list a verb speaks of: one in the singular takes the last, unless the list is one thing."""
    if len(group) > 1 and _SINGULAR.search(gap) and not _BOTH_BEFORE.search(before):
        return group[-1:]
    return group


def _matched(forms: list[_Item], others: list[_Item], after: str) -> Iterator[tuple[str, str]]:
    """(form, value) pairs of two lists: one to all, or in turn where the sentence says *respectively*."""
    if len(forms) == 1 or len(others) == 1:
        yield from ((form.value, other.value) for form in forms for other in others)
    elif len(forms) == len(others) and _RESPECTIVELY.match(after):
        yield from ((form.value, other.value) for form, other in zip(forms, others, strict=True))


def _is_aside(gap: str, before: str) -> bool:
    """Whether what follows speaks of the form although the form is no subject: *this differs from F, which means G*."""
    return bool(_ASIDE.match(gap) and not re.search(r"\b(?:in|of|on|within) (?:\w+ )?$", before))


def _form_then_gloss(
    gap: str, before: str, after: str, forms: list[_Item], alone: bool, is_choice: bool
) -> list[_Item]:
    """The forms of the list that the gloss after ``gap`` belongs to; none if the words do not say so."""
    if _F_PARENTHESIS_G.fullmatch(gap):
        return forms[-1:]
    if is_choice:  # 'does F or F mean G?' states nothing
        return []
    if _F_SIGN_G.fullmatch(gap) or _F_APPOSITION_G.fullmatch(gap):
        return forms[-1:]
    if _F_COMMA_G.fullmatch(gap):
        return forms if len(forms) == 1 and re.match(r"\s*[.,;:)]|$", after) else []
    if _WITH_F_G.fullmatch(gap):
        return forms if _WITH_BEFORE.search(before) else []
    if _F_AS_G.fullmatch(gap):
        return forms[-1:] if _SAYING_BEFORE.search(before) else []
    is_subject = not _PIECE.search(gap) and (not _NOT_SUBJECT.search(before) or _is_aside(gap, before))
    if _F_IS_G.fullmatch(gap):
        return _subjects(forms, gap, before) if is_subject or _MEANING_OF.search(before) else []
    if _F_FOR_G.fullmatch(gap):
        return forms
    if is_subject and (_F_MEANS_G.fullmatch(gap) or _F_IS_A_G.fullmatch(gap)):
        return _subjects(forms, gap, before)
    is_later = _F_LATER_MEANS_G.fullmatch(gap) or (_ITS_MEANING_AFTER.match(after) and not re.search(r"[.;?!()]", gap))
    return forms if is_later and alone and not _PIECE.search(before + gap) else []


def _gloss_then_form(gap: str, before: str, after: str) -> bool:
    if _G_PARENTHESIS_F.fullmatch(gap):
        return after[:1] in (")", ",", ";") or after.startswith((" and", " or"))
    if _G_SIGN_F.fullmatch(gap) or _G_TRANSLATES_F.fullmatch(gap):
        return True
    if _NEGATED.search(gap):
        return False
    if _G_WHERE_F.fullmatch(gap) or (_G_COMMA_F.fullmatch(gap) and _AS_WORD_FOR_BEFORE.search(before)):
        return True
    if _G_IS_F.fullmatch(gap):
        return True
    if _G_AS_F.fullmatch(gap):
        return bool(_SAYING_BEFORE.search(before))
    if _G_LISTED_F.fullmatch(gap):
        return True
    opened = _OPENING_BEFORE.search(before)
    if opened and _G_THEN_F_USED.fullmatch(gap) and _USED_AFTER.match(after):
        return True
    return bool((opened or _FOR_BEFORE.search(before)) and _G_USE_F.fullmatch(gap))


def _sentences(encoded: str) -> list[tuple[int, int]]:
    bounds, start = [], 0
    for match in _SENTENCE_END.finditer(encoded):
        bounds.append((start, match.end()))
        start = match.end()
    if encoded[start:].strip():
        bounds.append((start, len(encoded)))
    return bounds


def _pair_glosses(encoded: str, items: list[_Item], sentences: list[tuple[int, int]], facts: _Facts) -> list[_Item]:
    """Pair forms and glosses that stand side by side; returns the glosses that found no form."""
    groups = _groups(encoded, [item for item in items if item.kind != P])
    used: set[int] = set()
    for left, right in pairwise(groups):
        if left[0].kind == right[0].kind:
            continue
        gap = encoded[left[-1].at + 1 : right[0].at]
        if len(gap) > 160:
            continue
        before = encoded[max(0, left[0].at - 80) : left[0].at]
        after = encoded[right[-1].at + 1 : right[-1].at + 80]
        if left[0].kind == F:
            start, end = next(bound for bound in sentences if left[-1].at < bound[1])
            alone = len({item.value for item in items if item.kind == F and start <= item.at < right[0].at}) == 1
            glue = encoded[left[-2].at + 1 : left[-1].at] if len(left) > 1 else ""
            is_choice = " or " in glue and encoded.endswith("?", 0, end)
            if glue.strip(" -") == "," and _COMPARED_BEFORE.search(before):  # 'unlike F, F means G'
                left, before = left[-1:], ", "
            forms = _form_then_gloss(gap, before, after, left, alone, is_choice)
            pairs = list(_matched(forms, right, after)) if forms else []
            glosses = right
        elif left[0].at in used:
            continue
        else:
            pairs = list(_matched(right, left, after)) if _gloss_then_form(gap, before, after) else []
            glosses = left
        for form, gloss in pairs:
            facts.gloss(form, gloss)
        if pairs:
            used.update(item.at for item in glosses)
    return [item for item in items if item.kind == G and item.at not in used]


def _pair_bare_glosses(encoded: str, items: list[_Item], facts: _Facts) -> None:
    for item in items:
        if item.kind != F:
            continue
        if match := _F_PARENTHESIS_BARE.match(encoded, item.at + 1):
            if _is_bare_gloss(match["bare"]):
                facts.gloss(item.value, match["bare"])
        elif (match := _F_MEANS_BARE.match(encoded, item.at + 1)) and not _NOT_SUBJECT.search(
            encoded[max(0, item.at - 60) : item.at]
        ):
            _take_bare(match["bare"], item.value, facts)
        before = encoded[max(0, item.at - 90) : item.at]
        if " for " in before and (match := _BARE_IS_F.search(before)):
            _take_bare(match["bare"], item.value, facts)


def _take_bare(text: str, key: str, facts: _Facts) -> None:
    if (
        _is_bare_gloss(text)
        and len(text.split()) <= MAX_UNQUOTED_WORDS
        and (text.startswith("to ") or (len(text.split()) <= 4 and not _BARE_STOP.search(text)))
    ):
        facts.gloss(key, text)


def _form_then_pos(gap: str, plain: str, before: str, forms: list[_Item], facts: _Facts) -> list[_Item]:
    """The forms of the list that the part of speech after ``gap`` belongs to. ``plain``: it without parentheses."""
    if _F_PARENTHESIS_P.fullmatch(gap):
        return forms[-1:]
    if _F_IS_A_P.fullmatch(plain):
        return _subjects(forms, plain, before)
    if len(forms) == 1 and (
        (_F_MEANS_G_P.fullmatch(gap) and facts.has_gloss(forms[0].value)) or _F_ITS_P.fullmatch(plain)
    ):
        return forms
    if _F_AS_A_P.fullmatch(plain):
        return forms
    if _CALL_F_P.fullmatch(plain) and _CALL_BEFORE.search(before):
        return forms[-1:]
    if _COMPARED_BEFORE.search(before):  # 'unlike F, a P ...' speaks of something else
        return []
    if _F_COMMA_P.fullmatch(plain):
        return forms[-1:]
    return forms if len(forms) == 1 and _F_LATER_P.fullmatch(plain) and not _NEGATED.search(plain) else []


def _pos_then_form(gap: str, plain: str, before: str) -> bool:
    return bool(
        _P_F.fullmatch(plain)
        or (_P_COMMA_F.fullmatch(gap) and _AS_BEFORE.search(before))
        or (_P_CLASS_F.fullmatch(plain) and (len(plain) > 6 or _CLASS_BEFORE.search(before)))
        or _P_FOR_G_IS_F.fullmatch(gap)
    )


def _pair_pos(encoded: str, items: list[_Item], facts: _Facts) -> None:
    groups = _groups(encoded, [item for item in items if item.kind != G], drop_parentheses=True)
    used: set[int] = set()
    for left, right in pairwise(groups):
        if left[0].kind == right[0].kind:
            continue
        gap = encoded[left[-1].at + 1 : right[0].at]
        if len(gap) > 120:
            continue
        before = encoded[max(0, left[0].at - 60) : left[0].at]
        after = encoded[right[-1].at + 1 : right[-1].at + 80]
        plain = _INNER_PARENTHESES.sub("", gap) if "(" in gap else gap
        if left[0].kind == F:
            forms, labels = _form_then_pos(gap, plain, before, left, facts), right
        elif left[0].at in used:
            continue
        else:
            forms, labels = right if _pos_then_form(gap, plain, before) else [], left
        if forms:
            used.update(item.at for item in labels)
        for form, label in _matched(forms, labels, after):
            facts.pos.setdefault((form, label))


def _pair_sentences(
    encoded: str,
    items: list[_Item],
    sentences: list[tuple[int, int]],
    asked: set[str],
    facts: _Facts,
    free: list[_Item],
) -> None:
    """Sentences that speak of the one form of a sentence before; ``asked``: the forms of the question."""
    antecedents = asked
    by_position = {item.at: item for item in items}
    free_at = {item.at for item in free}
    for start, end in sentences:
        inside = [item for item in items if start <= item.at < end]
        sentence = encoded[start:end]
        offset = start + len(sentence) - len(sentence.lstrip())
        if len(antecedents) == 1:
            (key,) = antecedents
            if match := _ANAPHOR_POS.match(encoded, offset, end):
                label = by_position[encoded.index(P, offset, match.end())]
                facts.pos.setdefault((key, label.value))
            if match := _ANAPHOR_MEANS.match(encoded, offset, end):
                if match["bare"] is not None:
                    _take_bare(match["bare"], key, facts)
                elif match.end() - 1 in free_at:
                    facts.gloss(key, by_position[match.end() - 1].value)
        named = {item.value for item in inside if item.kind == F}
        if named and not (antecedents and _SAME_TOPIC.match(encoded, offset, end)):
            antecedents = named


def _metadata_facts(row: Row, forms: dict[str, str], facts: _Facts) -> None:
    """Gloss and part of speech that the source gives beside the text: those of the stem, where it names one."""
    metadata = row.metadata
    if not metadata:
        return
    if str(metadata.get("language", "")).startswith("planted") and isinstance(metadata.get("form"), str):
        forms.setdefault(fold(metadata["form"]), normalize(metadata["form"]))
    gloss, pos = metadata.get("gloss"), metadata.get("pos") or metadata.get("part_of_speech")
    if not isinstance(gloss, str) and not isinstance(pos, str):
        return
    headword = metadata.get("stem") or metadata.get("form") or (row.lexemes[0] if len(row.lexemes) == 1 else None)
    if not isinstance(headword, str) or fold(headword) not in forms:
        return
    if isinstance(gloss, str) and gloss.strip():
        facts.gloss(fold(headword), normalize(gloss))
    if isinstance(pos, str) and pos.strip():
        facts.pos.setdefault((fold(headword), normalize_pos(pos)))


def extract_facts(row: Row) -> RowFacts:
    """The forms that an annotated row mentions, with the glosses and parts of speech that it states for them."""
    forms, facts = facts_by_key(row)
    return RowFacts(
        tuple(forms.values()),
        tuple((forms[key], gloss) for (key, _), gloss in facts.glosses.items()),
        tuple((forms[key], pos) for key, pos in facts.pos),
    )


def facts_by_key(row: Row) -> tuple[dict[str, str], _Facts]:
    """The row's forms, key to spelling, and what it says of those keys."""
    forms = {fold(form): form for form in reversed(row.lexemes)}
    forms = dict(reversed(forms.items()))
    facts = _Facts()
    _metadata_facts(row, forms, facts)
    if not forms:
        return forms, facts
    longest_first = dict(sorted(forms.items(), key=lambda item: -len(item[0])))
    question = "\n".join(turn["content"] for turn in row.prompt)[:MAX_CHARACTERS]
    answer = row.answer[:MAX_CHARACTERS]
    spans = [_quoted_spans(text) for text in (question, answer)]
    quoted_keys: set[str] = set()
    if any(map(str.isascii, forms)):
        for text, found in zip((question, answer), spans, strict=True):
            quoted_keys.update(fold(text[start:end].strip("-")) for start, end in found)

    asked: set[str] = set()
    unpaired: list[list[_Item]] = []
    texts: list[tuple[str, list[_Item]]] = []
    for number, (text, found) in enumerate(zip((question, answer), spans, strict=True)):
        encoded, items = _encode(text, longest_first, found, quoted_keys)
        texts.append((encoded, items))
        sentences = _sentences(encoded)
        free: list[_Item] = []
        if any(item.kind == F for item in items):
            free = _pair_glosses(encoded, items, sentences, facts)
            _pair_bare_glosses(encoded, items, facts)
            if any(item.kind == P for item in items):
                _pair_pos(encoded, items, facts)
        else:
            free = [item for item in items if item.kind == G]
        _pair_sentences(encoded, items, sentences, asked if number else set(), facts, free)
        unpaired.append(free)
        if not number:
            asked = {item.value for item in items if item.kind == F}
    _pair_answer(texts, unpaired, asked, facts)
    return forms, facts


def _pair_answer(
    texts: list[tuple[str, list[_Item]]], unpaired: list[list[_Item]], asked: set[str], facts: _Facts
) -> None:
    """Question and answer together: a gloss asked for with the one new form, a form asked for with a gloss."""
    (question, _), (answer, items) = texts
    named = {item.value for item in items if item.kind == F}
    new = named - asked
    glosses = {fold(item.value): item.value for item in unpaired[0]}
    if len(new) == 1 and len(named) == 1 and len(glosses) == 1 and _ASKS_FORM.search(question):
        (key,), (gloss,) = new, glosses.values()
        if not facts.has_gloss(key):
            facts.gloss(key, gloss)
    elif len(asked) > 1 and len(glosses) == 1 and not new and _CHOICE.search(question):
        (gloss,) = glosses.values()
        open_ = [item.value for item in items if item.kind == F and not facts.has_gloss(item.value)]
        first = next((item.value for item in items if item.kind == F), None)
        if set(open_) == {first} and not any(key == fold(gloss) for _, key in facts.glosses):
            facts.gloss(first, gloss)
    elif len(asked) == 1 and not glosses and unpaired[1] and _ASKS_MEANING.search(question):
        match = _ANSWERS_MEANING.match(answer)
        (key,) = asked
        if match and not facts.has_gloss(key) and match.end() - 1 == unpaired[1][0].at:
            facts.gloss(key, unpaired[1][0].value)


# Words of a gloss that say nothing about what it means.
_EMPTY = frozenset(
    """
    a an the to of in on at for from with without by as into about over under up down out off and or nor but not no be is
    are was were been being am do does did have has had get gets got make makes i you he she it we they me him her us
    them my your his its our their s someone somebody something anything one oneself person people thing things who whom
    any whose which that this these those very some
    """.split()  # noqa: SIM905
)


def content_words(gloss: str) -> frozenset[str]:
    """The words of a gloss that carry its meaning, folded and without English endings: ``gathering`` is ``gather``.

    A gloss of empty words alone (``to be``) keeps them all.
    """
    found = [word.removesuffix("'s") for word in map(str.casefold, words(gloss))]
    kept = [word for word in found if word not in _EMPTY] or found
    return frozenset(map(_stem, kept))


def _stem(word: str) -> str:
    if word.endswith("ves"):  # leaves
        word = word.removesuffix("ves") + "f"
    word = word.removesuffix("ful") if len(word) > 6 else word  # careful
    for ending, left in (("iness", "y"), ("ness", ""), ("ings", ""), ("ing", ""), ("ies", "y"), ("ied", "y"),
                         ("ed", ""), ("es", ""), ("ly", ""), ("s", "")):  # fmt: skip
        if word.endswith(ending) and len(word) - len(ending) >= 3 and not word.endswith("ss"):
            word = word.removesuffix(ending) + left
            break
    if len(word) > 3 and word[-1] == word[-2] and word[-1] not in "aeiouls":
        word = word[:-1]  # running, runn, run
    return word.removesuffix("e") if len(word) > 3 else word
