"""Two tokenisations of one text: shared chunks, trusted boundaries, vocabulary maps, and pictures of them."""
