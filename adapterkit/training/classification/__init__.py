"""Pictures and the classes that they are of: finding them, changing them while training, figures."""
