"""Rows of one language, task or paradigm, of files that join several."""


def _where(column: str, value: str):
    return lambda rows: rows.filter(lambda row: row[column] == value)


adjunct_island = _where("UID", "adjunct_island")
estonian = _where("language", "et")
german = _where("language", "de")
boolean_expressions = _where("task", "boolean_expressions")
