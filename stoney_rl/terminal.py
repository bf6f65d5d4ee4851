"""Plain text laid out for a terminal: tables, wrapping and cutting by display width, not by code points."""

import unicodedata


def columns(header, cells):
    """The display width of each column."""
    return [max(display_width(line[column]) for line in [header, *cells]) for column in range(len(header))]


def grid(header, cells, *, rules):
    """Lines of a table with a rule under the header and after every ``rules`` lines but the last."""
    widths = columns(header, cells)
    rule = "  ".join("─" * width for width in widths)
    lines = ["  ".join(map(pad, header, widths)).rstrip(), rule]
    for index, line in enumerate(cells):
        if index and index % rules == 0:
            lines.append(rule)
        lines.append("  ".join(map(pad, line, widths)).rstrip())
    return lines


def display_width(text):
    """Terminal columns of ``text``: combining marks take none (a line below may be one), wide characters two."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def pad(text, width):
    """``text`` with spaces up to ``width`` terminal columns."""
    return text + " " * (width - display_width(text))


def wrap(text, width, hanging=""):
    """Lines of ``text`` no wider than ``width``; line breaks are kept, long words are broken between characters."""
    lines = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            while word:
                prefix = line + " " if line.strip() else line
                if display_width(prefix + word) <= width:
                    line, word = prefix + word, ""
                elif line.strip():
                    lines.append(line)
                    line = hanging
                else:
                    size = len(word)
                    while size > 1 and display_width(line + word[:size]) > width:
                        size -= 1
                    while size < len(word) and unicodedata.combining(word[size]):
                        size += 1
                    lines.append(line + word[:size])
                    line, word = hanging, word[size:]
        if line.strip():
            lines.append(line)
    return lines or [""]


def cut(text, width, max_lines):
    """At most ``max_lines`` wrapped lines; the last ends in '…' if there was more."""
    lines = wrap(text, width)
    if len(lines) > max_lines:
        lines = lines[:max_lines]
        while display_width(lines[-1]) > width - 2:
            lines[-1] = lines[-1][:-1]
        lines[-1] = lines[-1].rstrip() + " …"
    return lines
