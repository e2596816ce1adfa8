"""HTML pages that hold all that they show: curves, tables and galleries of pictures, for any command.

They open offline, ask no network for anything, and run no script but the ones in `assets/`.
"""
