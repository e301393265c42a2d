"""Tables."""


def write_tables(folder, output):
    pass
