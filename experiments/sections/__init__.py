"""The sections of the suite `quality`: each is a function from a `Bench` to its `Findings`."""
