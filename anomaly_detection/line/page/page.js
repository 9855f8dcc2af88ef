fetch("verdicts")
  .then((answer) => answer.text())
  .then((text) => (document.getElementById("verdicts").textContent = text));
