"""What can go wrong in `training/`, as one tree.

TrainingError
├── RecipeError    a recipe or an override that cannot be used, naming the key
└── DataError      a data file or row that cannot be used, naming file and line
"""


class TrainingError(Exception):
    """Any error of training that the user can mend. Its message is one line."""


class RecipeError(TrainingError):
    """A recipe file or a `key=value` override is not valid."""


class DataError(TrainingError):
    """A data source is missing, or one of its rows does not have the documented fields."""
