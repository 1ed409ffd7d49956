"""What opens above the lists: questions, forms, texts and menus. Each returns what was decided."""
