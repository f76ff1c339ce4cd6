"""What Linux says of the machine and of this process in /proc."""

import re


def value(path, *keys):
    """What stands after the colon in the first line of a file that begins with one of the keys;
    None where there is no such line, or no such file."""
    try:
        with open(path) as file:
            for line in file:
                if line.startswith(keys):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return None


def loaded(pattern):
    """The files loaded into this process whose paths match, sorted."""
    try:
        with open("/proc/self/maps") as file:
            return sorted(set(re.findall(pattern, file.read())))
    except OSError:
        return []
