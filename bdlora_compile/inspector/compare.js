"use strict";
// Two stages side by side: nodes are matched by their stable key, in the order of the longest common sequence.

/** Rows {status, left, right}; status is same, changed, moved, removed or added. */
function compareNodes(left, right) {
  const common = longestCommon(left.map((node) => node.key), right.map((node) => node.key));
  const rightKeys = new Map(right.map((node) => [node.key, node]));
  const leftKeys = new Map(left.map((node) => [node.key, node]));
  const rows = [];
  let i = 0;
  let j = 0;
  const flush = (toLeft, toRight) => {
    for (; i < toLeft; i += 1) {
      const moved = rightKeys.get(left[i].key);
      rows.push(moved ? { status: "moved", left: left[i], right: null, is: moved } : { status: "removed", left: left[i], right: null });
    }
    for (; j < toRight; j += 1) {
      const moved = leftKeys.get(right[j].key);
      rows.push({ status: moved ? "moved" : "added", left: null, right: right[j], is: moved });
    }
  };
  for (const [a, b] of common) {
    flush(a, b);
    rows.push({ status: differences(left[a], right[b]).length ? "changed" : "same", left: left[a], right: right[b] });
    i = a + 1;
    j = b + 1;
  }
  flush(left.length, right.length);
  return rows;
}

const COMPARED = ["operator", "type", "placement", "arguments", "origin", "site", "source"];

/** Names of what differs between two nodes of one key. */
function differences(left, right) {
  const found = COMPARED.filter((name) => left[name] !== right[name]);
  if (left.operands.join("\n") !== right.operands.join("\n")) found.push("operands");
  return found;
}

function longestCommon(left, right) {
  // Equal ends cost nothing; what is between them takes a table.
  let start = 0;
  while (start < left.length && start < right.length && left[start] === right[start]) start += 1;
  let endLeft = left.length;
  let endRight = right.length;
  while (endLeft > start && endRight > start && left[endLeft - 1] === right[endRight - 1]) { endLeft -= 1; endRight -= 1; }
  const rows = endLeft - start;
  const columns = endRight - start;
  const table = new Uint32Array((rows + 1) * (columns + 1));
  const at = (i, j) => i * (columns + 1) + j;
  for (let i = rows - 1; i >= 0; i -= 1) {
    for (let j = columns - 1; j >= 0; j -= 1) {
      table[at(i, j)] = left[start + i] === right[start + j]
        ? table[at(i + 1, j + 1)] + 1 : Math.max(table[at(i + 1, j)], table[at(i, j + 1)]);
    }
  }
  const pairs = [];
  for (let k = 0; k < start; k += 1) pairs.push([k, k]);
  for (let i = 0, j = 0; i < rows && j < columns;) {
    if (left[start + i] === right[start + j]) { pairs.push([start + i, start + j]); i += 1; j += 1; }
    else if (table[at(i + 1, j)] >= table[at(i, j + 1)]) i += 1;
    else j += 1;
  }
  for (let k = 0; endLeft + k < left.length; k += 1) pairs.push([endLeft + k, endRight + k]);
  return pairs;
}
