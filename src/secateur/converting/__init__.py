"""How conversions are carried out: models opened, their matrices converted block by block, and written."""
