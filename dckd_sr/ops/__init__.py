"""Pure operations on tensors and arrays: no option dicts, no files."""
