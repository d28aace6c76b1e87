"""Turning jsonargparse's tree of attempts into one line that names the thing, the value and what would work."""

import re


def one_line(message: str) -> str:
    """Reduce a parser message to its innermost cause.

    jsonargparse tries every member of a union and reports each; the cause is the most deeply indented complaint about
    an option or a class, and the keys on the way to it are its address.
    """
    lines = message.splitlines()
    keys = [match.group(1) for line in lines if (match := re.search(r'[Pp]arser key "([^"]+)"', line))]
    causes = [line for line in lines if re.search(r"is not accepted|not expected|does not exist|[Cc]ould not|"
              r"Problem with|[Ii]nvalid|required|not a (?:sub)?class|No action|expects|Expected|does not correspond|"
              r"Unable", line)]  # fmt: skip
    if not causes:
        return " ".join(message.split())
    depth = max(len(line) - len(line.lstrip(" -")) for line in causes)
    innermost = next(line for line in causes if len(line) - len(line.lstrip(" -")) == depth)
    address = ".".join(keys)
    return f"{address}: {innermost.strip(' -')}" if address else innermost.strip(" -")
