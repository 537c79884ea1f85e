package election

import (
	"errors"
	"fmt"
	"sync"

	"posthouse/mesh"
)

// ErrStale means that an act stands on an election that has been superseded.
var ErrStale = errors.New("it stands on an election that has been superseded")

// ErrRivals means that two lineages of one generation contradict each other.
var ErrRivals = errors.New("two lineages of one generation: a person has to promote one of them")

// Compare orders two authorities: below zero when a is older. It returns
// ErrRivals where there is no order.
func Compare(a, b mesh.Authority) (int, error) {
	switch {
	case a.Generation < b.Generation:
		return -1, nil
	case a.Generation > b.Generation:
		return 1, nil
	case a.Lineage != b.Lineage:
		return 0, ErrRivals
	case a.Term < b.Term:
		return -1, nil
	case a.Term > b.Term:
		return 1, nil
	}
	return 0, nil
}

// Fence lets the acts of the newest known master pass and no older one's. It
// is safe for concurrent use.
type Fence struct {
	mu      sync.Mutex // guards highest
	highest mesh.Authority
	keep    func(mesh.Authority) error
}

// NewFence starts at the highest authority that was kept before; keep makes a
// higher one durable before its act passes, and may be nil.
func NewFence(highest mesh.Authority, keep func(mesh.Authority) error) *Fence {
	return &Fence{highest: highest, keep: keep}
}

// Admit returns nil if an act under a may be done.
func (f *Fence) Admit(a mesh.Authority) error {
	f.mu.Lock()
	highest := f.highest
	f.mu.Unlock()
	if highest == (mesh.Authority{}) {
		highest = mesh.Authority{Lineage: a.Lineage}
	}
	switch c, err := Compare(a, highest); {
	case err != nil:
		return err
	case c < 0:
		return fmt.Errorf("%w: generation %d term %d, known is %d, %d", ErrStale, a.Generation, a.Term, highest.Generation, highest.Term)
	case c == 0:
		return nil
	}
	if f.keep != nil {
		if err := f.keep(a); err != nil {
			return fmt.Errorf("keep the master's authority: %w", err)
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if c, err := Compare(a, f.highest); err == nil && c > 0 || f.highest == (mesh.Authority{}) {
		f.highest = a
	}
	return nil
}
