package kv

import (
	"bytes"

	"github.com/google/btree"
)

// row is one operation as the overlay and the memory store keep it.
type row struct {
	key, value []byte
	del        bool
}

func rowLess(a, b row) bool { return bytes.Compare(a.key, b.key) < 0 }

// rowCost is what a row takes beside key and value: in the overlay's tree and,
// more than needed, in Badger's estimate (timestamp, marks, header).
const rowCost = 32

// generation is a part of the overlay that becomes one commit: the rows of
// adjacent records, each key once. It is written by Apply under View.mu while
// it is the last one, then never changed again.
type generation struct {
	rows  *btree.BTreeG[row]
	shot  *btree.BTreeG[row] // clone of rows as they are now, or nil
	bytes int
	seq   uint64 // of the last record in it
}

func newGeneration() *generation { return &generation{rows: btree.NewG(32, rowLess)} }

func (g *generation) put(o op) (bytes, rows int) {
	g.shot = nil
	r := row(o)
	old, had := g.rows.ReplaceOrInsert(r)
	n := len(r.key) + len(r.value) + rowCost
	if had {
		n -= len(old.key) + len(old.value) + rowCost
	} else {
		rows = 1
	}
	g.bytes += n
	return n, rows
}

func (g *generation) get(key []byte) (row, bool) { return g.rows.Get(row{key: key}) }

// touches reports whether the generation has a row in [from, end).
func (g *generation) touches(from, end []byte) (found bool) {
	g.rows.AscendGreaterOrEqual(row{key: from}, func(r row) bool {
		found = end == nil || bytes.Compare(r.key, end) < 0
		return false
	})
	return found
}

func (g *generation) sorted() []row {
	rs := make([]row, 0, g.rows.Len())
	g.rows.Ascend(func(r row) bool { rs = append(rs, r); return true })
	return rs
}

// prefixEnd returns the first key after all that start with prefix; nil: none.
func prefixEnd(prefix []byte) []byte {
	for i := len(prefix) - 1; i >= 0; i-- {
		if prefix[i] != 0xff {
			end := bytes.Clone(prefix[:i+1])
			end[i]++
			return end
		}
	}
	return nil
}

// treeIter walks a tree that nobody changes, a piece at a time, so that a scan
// that ends early costs little.
type treeIter struct {
	tree *btree.BTreeG[row]
	end  []byte
	buf  []row
	at   int
	more bool
}

func newTreeIter(t *btree.BTreeG[row], from, end []byte) *treeIter {
	it := &treeIter{tree: t, end: end, buf: make([]row, 0, 8)}
	it.fill(from, false)
	return it
}

func (it *treeIter) fill(from []byte, after bool) {
	n := min(max(8, 4*len(it.buf)), 512)
	it.buf, it.at, it.more = it.buf[:0], 0, false
	it.tree.AscendGreaterOrEqual(row{key: from}, func(r row) bool {
		if after && bytes.Equal(r.key, from) {
			return true
		}
		if it.end != nil && bytes.Compare(r.key, it.end) >= 0 {
			return false
		}
		if len(it.buf) == n {
			it.more = true
			return false
		}
		it.buf = append(it.buf, r)
		return true
	})
}

func (it *treeIter) valid() bool { return it.at < len(it.buf) }
func (it *treeIter) row() row    { return it.buf[it.at] }
func (it *treeIter) next() {
	if it.at++; it.at == len(it.buf) && it.more {
		it.fill(it.buf[it.at-1].key, true)
	}
}

// The rest makes it an iterator of a snapshot: the memory store's.

func (it *treeIter) key() []byte            { return it.row().key }
func (it *treeIter) value() ([]byte, error) { return it.row().value, nil }
func (it *treeIter) err() error             { return nil }
func (it *treeIter) close()                 {}

// merge walks the layers of the overlay, the newest first, over the committed
// rows below, and gives each key once.
func merge(layers []*treeIter, base iterator, f func(key, value []byte) bool) error {
	for {
		var least []byte
		top := -1 // the newest layer that has the least key; -1: base
		found := base.valid()
		if found {
			least = base.key()
		}
		for i, l := range layers {
			if !l.valid() {
				continue
			}
			if k := l.row().key; !found || bytes.Compare(k, least) < 0 || (top < 0 && bytes.Equal(k, least)) {
				least, top, found = k, i, true
			}
		}
		if !found {
			return base.err()
		}
		if top < 0 {
			val, err := base.value()
			if err != nil {
				return err
			}
			if !f(least, val) {
				return nil
			}
			base.next()
			continue
		}
		r := layers[top].row()
		for _, l := range layers {
			if l.valid() && bytes.Equal(l.row().key, r.key) {
				l.next()
			}
		}
		if base.valid() && bytes.Equal(base.key(), r.key) {
			base.next()
		}
		if !r.del && !f(r.key, r.value) {
			return nil
		}
	}
}
