"""The small models that ship, the workbook of generated tasks that they solve, and their tokenizer.

Nothing here imports torch."""
