"""Who holds which expert: adverts, the view made of them, placement and the choice of a holder."""
