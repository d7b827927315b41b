"""How the types are said in files of PEFT, one type a file."""
