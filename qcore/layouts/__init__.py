"""How tools pack integer codes on disk, apart from the configs that say so: several formats share each of these."""
