"""The patterns by which a response announces an option: one statement, one choice, one of several called better."""

from __future__ import annotations

import re

from mipo_ray.text.final_answers.statements import ANSWER, IS

# What may stand between "the answer is" and the answer: quotes, brackets, Markdown and LaTeX around it.
_QUOTES = r"\u201c\u2018\u201e\u00ab\u300c\u300e\u3010"
OPEN = rf"""(?:[\s*_`"'{_QUOTES}(\[{{<$:,\u2013\u2014-]|\\(?:boxed|textbf|text|mathbf|mathrm)?){{0,16}}+"""
NOUNS = (
    r"(?:(?:the|option|choice|answer|letter|number|statement|therefore|thus|indeed|actually|clearly|probably|likely"
    rf"|most|definitely|still|correct|right|best|final|la|el|le|die|der|\u03b7|(?:a\s)?letra|lettre|opci\u00f3n"
    rf"|donc|daher|also|quindi|entonces)\b{OPEN})" + "{0,5}"
)
# The labels of options that the reader knows; the letter classes of the patterns below are these.
LABELS = frozenset("ABCDEFGHIJabcdefghij12345")
_LETTER = r"(?P<letter>[A-Ja-j1-5])(?!\w)"
CLOSE = r"""[)\]}>.:*_"'\u201d\u2019`$\u300d\u300f\u00bb\u3011]{0,6}+"""

# What announces a choice, in any case. A negation in "between" undoes it.
WORD = (
    rf"(?:{ANSWER}|\b(?:option|choice|solution|l\u00f6sung|soluci\u00f3n|soluzione|opci\u00f3n|opzione|alternativa)\b)"
)
_ANSWER_IS = rf"{WORD}(?P<between>(?:(?!{WORD})[^.!?\n]){{0,80}}?){IS}"
CHOOSE = (
    r"(?:\b(?:choose|chose|choosing|pick|picked|picking|select|selected|selecting|opt for|opted for|go with|going with"
    r"|went with|go for|going for|settle on|settled on|elijo|escojo|escolho|scelgo|w\u00e4hle|choisis"
    r"|\u0432\u044b\u0431\u0438\u0440\u0430\u044e|wybieram|(?:t\u00f4i|em) (?:s\u1ebd )?ch\u1ecdn"
    r"|saya (?:akan )?memilih)\b"
    # Chinese "choose", but for "option", "not", and what somebody "will" or "may".
    r"|(?:(?<![\u4e0d\u522b\u52ff\u8bef\u9519\u4f1a\u80fd])"
    r"|(?<=\u6211\u4f1a))[\u9009\u9078][\u62e9\u64c7]?(?![\u9879\u9805\u629e]))"
)
SO = (
    r"\b(?:it's|it\u2019s|it is|(?:must|should|would|has to) be|i think|i believe"
    r"|i(?:['\u2019]d|['\u2019]ll| will| would)? say|i guess|therefore|thus|hence|so)\b"
)
BOXED = r"\\boxed\s?\{"
# What follows an option that is called the answer: "... is the best answer".
IS_CORRECT = (
    r"\s(?:is|was|must be|would be|should be|has to be|seems|seems to be|looks)"
    r"(?:\s(?:the|a|our|my|clearly|definitely|probably|most|likely|therefore|thus|indeed|actually|only|one|also"
    r"|single|final|accurate|appropriate|suitable)){0,5}\s(?:correct|right|best|answer)"
    r"(?:\s(?:answer|option|choice|one|statement|response|explanation|conclusion|description|example))?"
    r"(?=[)*_]{0,4}(?:\Z|[.,;!:\n]|\s(?:because|since|as|here|so|for|among|of|to|given|based|but|and(?!\sso\s))\b))"
)

# A letter with what counts options in Korean, Japanese and Chinese.
_OBJECT = (
    r"(?<![\w'\u2019.-])(?-i:(?P<letter>[A-J]))(?!\w)\s?"
    r"(?:\ubc88|\u756a|[\u9879\u9805]|[\u9009\u9078][\u9879\u9805])?\s?"
)
_OTHER_LANGUAGES = (
    # but B: Chinese, Korean, Japanese
    rf"(?:\u800c\u662f|\uc544\ub2c8\ub77c|(?:\u3067\u306f|\u3058\u3083)\u306a\u304f\u3066?)[,\u3001]?{OPEN}{_LETTER}",
    # I choose B, where the verb comes last: Japanese, Korean; not "those who choose B"
    rf"{_OBJECT}\u3092\u9078(?:\u3073\u307e\u3059|\u3073\u307e\u3057\u305f|\u629e\u3057\u307e\u3059"
    rf"|\u3076(?=[\u3002.]|\Z))",
    rf"{_OBJECT}[\uc744\ub97c]\s?(?:\uc120\ud0dd(?:\ud569\ub2c8\ub2e4|\ud588\uc2b5\ub2c8\ub2e4"
    rf"|\ud558\uaca0\uc2b5\ub2c8\ub2e4|\ud55c\ub2e4)"
    r"|\uace0\ub974\uaca0\uc2b5\ub2c8\ub2e4|\uace0\ub985\ub2c8\ub2e4|\uace8\ub790\uc2b5\ub2c8\ub2e4)",
    # B is right: Chinese, Japanese, Korean
    rf"{_OBJECT}[\u662f\u4e3a\u70ba]?\u6700?(?:\u6b63[\u786e\u78ba]|\u5408\u9002|\u5bf9\u7684)(?![\u5417\u55ce\u4e0e])",
    rf"{_OBJECT}\u304c(?:\u6b63\u89e3|\u6b63\u3057\u3044|\u6700\u3082\u9069\u5207)(?!\u304b)",
    rf"{_OBJECT}[\uc774\uac00]\s?(?:\uc815\ub2f5|\ub9de)",
    rf"{_OBJECT}\u0e16\u0e39\u0e01",  # Thai
    r"\b(?:ist|est|es)\s(?:also\s|daher\s|donc\s)?(?-i:(?P<letter>[A-J]))\s(?:richtig|korrekt|correcte?|correct[ao])\b",
    r"(?<![\w'\u2019.-])(?-i:(?P<letter>[A-J]))(?!\w)[)*]{0,4}\s(?:ist|est|es|\u00e8|\u00e9)\s(?:la\s|die\s|a\s)?"
    r"(?:richtig|korrekt|correcte?|correct[ao]|corret[ao]|giusta|exacte?)\b",
)
STATEMENTS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        # the answer (to the question) is B; the correct option: B
        rf"{_ANSWER_IS}{OPEN}{NOUNS}{_LETTER}",
        # Answer B; **Final answer** (B)
        rf"{ANSWER}{OPEN}(?:(?:option|choice)\b{OPEN})?(?-i:(?P<letter>[A-J1-5]))(?!\w)",
        # I would choose option C
        rf"{CHOOSE}{OPEN}{NOUNS}{_LETTER}",
        # B is the best answer; (B) rain is correct
        rf"(?<![\w'\u2019.-])(?-i:(?P<letter>[A-J]))(?!\w){CLOSE}"
        r"(?:\s\([^()\n]{0,60}\)|(?<=[)\].:*])\s(?:(?!\b(?-i:[A-J])\b|\bnot\b|n't)[^.!?\n]){1,60}?)?"
        rf"{IS_CORRECT}",
        # C remains; statement C is true; Correct: C
        rf"(?<![\w'\u2019.-])(?-i:(?P<letter>[A-HJ]))(?!\w){CLOSE}\s(?:remains|is left)(?=[.,;!\n]|\Z)",
        r"\b(?:statement|option|choice)\s(?-i:(?P<letter>[A-J]))\sis\s(?:true|right)(?=[.,;!\n]|\Z)",
        rf"\b(?:(?:correct|right)\s?[:=]|key\sis\b){OPEN}(?-i:(?P<letter>[A-J]))(?!\w)",
        # not A but B
        rf"\bnot\b{OPEN}[A-J]{CLOSE},?\s(?:but|rather)(?:\s(?:rather|is|it's|it is))?{OPEN}{_LETTER}",
        # I think B. So B. (the sentence ends there)
        rf"{SO}{OPEN}(?:(?:option|choice|actually|clearly|definitely|probably|likely)\b{OPEN}){{0,2}}"
        r"(?-i:(?P<letter>[A-HJ]))(?!\w)"
        rf"(?={CLOSE}(?:\s{{0,4}}\Z|\n|(?<=[.])\s|[,;!]|\s(?:because|since|as)\b))",
        rf"{BOXED}{OPEN}{_LETTER}(?=[^{{}}\n]{{0,200}}\}})",
        *_OTHER_LANGUAGES,
    )
)
# One option over others: weaker than a statement, as it may only order what is left.
IS_BETTER = (
    r"(?:,\s(?:however|though|by contrast|on balance),)?\s(?:(?:is|was|seems|looks|sounds|appears|would be"
    r"|seems to be|appears to be)"
    r"(?:\s(?:the|a|an|much|slightly|clearly|still|far|even|also|overall)){0,4}"
    r"\s(?:better|best|stronger|strongest|closer|closest|superior|preferable"
    r"|(?:more|most)\s(?:likely|accurate|plausible|appropriate|suitable|precise|correct|complete|fitting|reasonable"
    r"|convincing|sensible|specific))|stands\sout(?:\sas\sthe\sbest)?|(?:fits|matches|works"
    r"|answers it)\s(?:better|best)|makes\s(?:more|the\smost)\ssense"
    r"|\w{3,12}s\s(?:\w{1,12}\s){0,3}(?:better|best|(?:more|most)\s(?:accurate|complete|precise|direct|close|clear|ful"
    r"|specifical)ly))"
    r"(?:\s(?:one|option|choice|answer|fit|match|candidate|statement|description))?"
    r"(?=[.,;!\n]|\Z|\s(?:than|to|because|since|as|here|still|for|of|overall)\b)"
)
BETTER = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"(?<![\w'\u2019.-])(?-i:(?P<letter>[A-HJ]))(?!\w){CLOSE}{IS_BETTER}",
        rf"\b(?:i|we)(?:['\u2019][dm]| would| am| do)?\s(?:lean|leaning|incline|inclined"
        rf"|tend)\s(?:more\s)?(?:towards?|to)"
        rf"\b{OPEN}{NOUNS}(?-i:(?P<letter>[A-HJ]))(?!\w)",
        rf"\b(?:i|we)(?:['\u2019]d| would| do)?\s(?:prefer|favou?r|rank)\b{OPEN}{NOUNS}(?-i:(?P<letter>[A-HJ]))(?!\w)",
    )
)
