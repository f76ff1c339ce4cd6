"""Unpacks some folders of wheels: python scripts/unpack.py TO WHEEL... FOLDER=PLACE...

Every file below FOLDER of any of the wheels arrives below TO/PLACE. Of libraries that a wheel holds
several times, under the names that a loader asks for, one copy stays and the others are links."""

import pathlib
import sys
import zipfile


def main(to, *arguments):
    roots = dict(a.split("=", 1) for a in arguments if "=" in a)
    written = {}  # what is in a file: where it lies
    for wheel in (a for a in arguments if "=" not in a):
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.infolist():
                for folder, place in roots.items():
                    if not member.is_dir() and member.filename.startswith(f"{folder}/"):
                        name = member.filename.removeprefix(f"{folder}/")
                        path = pathlib.Path(to, place, name)
                        path.parent.mkdir(parents=True, exist_ok=True)
                        path.unlink(missing_ok=True)
                        same = written.setdefault((path.parent, member.CRC, member.file_size), path)
                        if ".so" in name and same != path:
                            path.symlink_to(same.name)
                        else:
                            path.write_bytes(archive.read(member))


if __name__ == "__main__":
    main(*sys.argv[1:])
