"""The raters' web page: people label reference pictures and compare two models' pictures."""
