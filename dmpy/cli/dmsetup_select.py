"""The criteria of `-S`: which devices a report shows, or a verb is run on.

    criteria   := all_of { ("||" | "#") all_of }
    all_of     := one { ("&&" | ",") one }
    one        := ["!"] "(" criteria ")" | field operator value
    operator   := "=" "!=", for numbers also ">" ">=" "<" "<=", "=~" "!~" with a regular expression
    value      := a number, a word, or text in quotes; an expression also in ( ), [ ] or { }

Source: lvm2 v2_03_16 libdm/libdm-report.c, _parse_or_ex(), _parse_selection(), _tok_value().
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from dmpy.cli.dmsetup_driver import Failed, log_error
from dmpy.cli.dmsetup_report import Column, find_column, help_columns

__all__ = ["HELP", "parse"]

Rule = Callable[[dict[Column, Any]], bool]

# In the order in which they are tried: a longer one before its beginning.
_OPERATORS = ("=~", "!~", "=", "!=", ">=", ">", "<=", "<")
_TIME_OPERATORS = ("since", "after", "until", "before")
_AND, _OR = ("&&", ","), ("||", "#")
_UNITS = "bBsSkKmMgGtTpPeE"
_BRACKETS = {"(": ")", "{": "}", "[": "]", '"': '"', "'": "'"}

# What `-S help` and a criterion without an operator print.
HELP = """\
Selection operands
------------------
  field    - A field of the report.
  number   - Digits.
  string   - A word, or text in single or double quotes.
  regex    - A regular expression, plain, in quotes or in brackets.
 
Selection operators
-------------------
  Comparison operators:
      =~  - The regex is found.
      !~  - The regex is not found.
       =  - The same.
      !=  - Not the same.
      >=  - A number that is not smaller.
       >  - A bigger number.
      <=  - A number that is not bigger.
       <  - A smaller number.
 
  Logical and grouping operators:
      &&  - Both.
       ,  - Both.
      ||  - One of the two, or both.
       #  - One of the two, or both.
       !  - Not what the parentheses hold.
       (  - Begins a group.
       )  - Ends a group.
       [  - Begins a list.
       ]  - Ends a list.
       {  - Begins a list.
       }  - Ends a list.
 """


def parse(text: str, need: Callable[[Column], None], prefix: str) -> Rule:
    """Return the rule that says of a row's values whether it is chosen.

    Args:
        text: what -S says.
        need: called with each field that the rule looks at.
        prefix: as in `find_column`.

    Raises:
        Failed: the text cannot be understood; said on standard error.
    """
    parser = _Parser(text, need, prefix)
    rule, at = parser.any_of(0)
    at = parser.blanks(at)
    if at < len(text):
        log_error("Expecting logical operator")
        log_error(f"Selection syntax error at '{text[at:]}'.")
        log_error("Use 'help' for selection to get more help.")
        raise Failed
    return rule


# Each method takes the place where to read and returns what it read and the place after it.
class _Parser:
    def __init__(self, text: str, need: Callable[[Column], None], prefix: str) -> None:
        self._text = text
        self._need = need
        self._prefix = prefix

    def blanks(self, at: int) -> int:
        while at < len(self._text) and self._text[at].isspace():
            at += 1
        return at

    # The first of `words` that stands at a place, with the place after it.
    def _word(self, words: tuple[str, ...], at: int) -> tuple[str, int]:
        at = self.blanks(at)
        for word in words:
            if self._text.startswith(word, at):
                return word, at + len(word)
        return "", at

    def any_of(self, at: int) -> tuple[Rule, int]:
        rules = []
        word = "or"
        while word:
            rule, at = self._all_of(at)
            rules.append(rule)
            word, at = self._word(_OR, at)
        return (lambda row: any(rule(row) for rule in rules)), at

    def _all_of(self, at: int) -> tuple[Rule, int]:
        rules = []
        word = "and"
        while word:
            rule, at = self._one(at)
            rules.append(rule)
            word, at = self._word(_AND, at)
        return (lambda row: all(rule(row) for rule in rules)), at

    def _one(self, at: int) -> tuple[Rule, int]:
        mark, at = self._word(("!", "("), at)
        if not mark:
            return self._comparison(at)
        if mark == "!":
            mark, at = self._word(("(",), at)
            if not mark:
                log_error(f"Syntax error: left parenthesis expected at '{self._text[at:]}'")
                raise Failed
            rule, at = self._group(at)
            return (lambda row: not rule(row)), at
        return self._group(at)

    # What stands before a right parenthesis.
    def _group(self, at: int) -> tuple[Rule, int]:
        rule, at = self.any_of(at)
        mark, at = self._word((")",), at)
        if not mark:
            log_error(f"Syntax error: right parenthesis expected at '{self._text[at:]}'")
            raise Failed
        return rule, at

    def _comparison(self, start: int) -> tuple[Rule, int]:
        try:
            return self._compare(start)
        except Failed:
            log_error(f"Selection syntax error at '{self._text[start:]}'.")
            log_error("Use 'help' for selection to get more help.")
            raise

    def _compare(self, start: int) -> tuple[Rule, int]:
        end = start
        while end < len(self._text) and (self._text[end].isalnum() or self._text[end] in "_-"):
            end += 1
        word = self._text[start:end]
        if not word:
            log_error("Expecting field name")
            raise Failed
        column = find_column(word, self._prefix)
        if column is None or column.field.id in ("help", "?"):
            log_error(help_columns(types=True))
            log_error(" ")
            log_error(f"Unrecognised selection field: {word}" if column is None else
                      f"Selection field is uncomparable: {word}.")
            raise Failed
        operator, at = self._word(_OPERATORS + _TIME_OPERATORS, end)
        if not operator:
            log_error(HELP)
            log_error(f"Unrecognised comparison operator: {self._text[end:]}")
            raise Failed
        rule, at = self._rule(column, operator, start, at)
        self._need(column)
        return rule, at

    def _rule(self, column: Column, operator: str, start: int, at: int) -> tuple[Rule, int]:
        if operator in ("=~", "!~"):
            return self._expression(column, operator, at)
        if operator in _TIME_OPERATORS or operator[0] in "<>" and not column.field.numeric:
            kinds = "time" if operator in _TIME_OPERATORS else "number, size, time or percent"
            log_error(HELP)
            log_error(f"Operator can be used only with {kinds} fields: {self._text[start:]}")
            raise Failed
        value, at = (self._number if column.field.numeric else self._string)(column, at)
        compare: dict[str, Callable[[Any], bool]] = {
            "=": lambda own: own == value, "!=": lambda own: own != value,
            ">": lambda own: own > value, ">=": lambda own: own >= value,
            "<": lambda own: own < value, "<=": lambda own: own <= value,
        }
        test = compare[operator]
        return (lambda row: test(row[column])), at

    def _number(self, column: Column, at: int) -> tuple[int, int]:
        at = self.blanks(at)
        found = re.compile(r"[0-9]*\.?[0-9]*").match(self._text, at)
        digits = found.group() if found else ""
        if not digits:
            log_error(f"Failed to parse numeric value for selection field {column.field.id}.")
            raise Failed
        at += len(digits)
        after = self._text[at:at + 1]
        if after == "%":
            log_error("Found percent value but numeric value expected for selection field "
                      f"{column.field.id}.")
            raise Failed
        if after and after in _UNITS:
            log_error("Found size unit specifier but numeric value expected for selection field "
                      f"{column.field.id}.")
            raise Failed
        return int(digits.partition(".")[0] or 0), at

    def _string(self, column: Column, at: int) -> tuple[str, int]:
        at = self.blanks(at)
        quote = self._text[at:at + 1]
        if quote in ('"', "'") and quote:
            return self._quoted(column, "string", quote, at + 1)
        return self._plain(at)

    # Text up to the quote that ends it.
    def _quoted(self, column: Column, kind: str, quote: str, at: int) -> tuple[str, int]:
        end = self._text.find(quote, at)
        if end < 0:
            log_error("Missing end quote.")
            log_error(f"Failed to parse {kind} value for selection field {column.field.id}.")
            raise Failed
        return self._text[at:end], end + 1

    # Text up to a blank, a logical operator or a right parenthesis.
    def _plain(self, at: int) -> tuple[str, int]:
        end = at
        while end < len(self._text) and self._text[end] != " " and \
                not self._text.startswith((*_AND, *_OR, ")"), end):
            end += 1
        return self._text[at:end], end

    def _expression(self, column: Column, operator: str, at: int) -> tuple[Rule, int]:
        at = self.blanks(at)
        if at == len(self._text):
            log_error(f"Regular expression expected for selection field {column.field.id}")
            raise Failed
        end = _BRACKETS.get(self._text[at])
        if end:
            text, at = self._quoted(column, "regex", end, at + 1)
        else:
            text, at = self._plain(at)
        try:
            expression = re.compile(text, re.DOTALL)
        except re.error as error:
            log_error("dm_report: failed to create regex matcher for selection field "
                      f"{column.field.id}")
            raise Failed from error
        wanted = operator == "=~"
        return (lambda row: bool(expression.search(str(row[column]))) is wanted), at
