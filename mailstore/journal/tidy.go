package journal

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sort"
	"time"

	"posthouse/mailstore/log"
)

// Keeper is an Engine whose records may be compacted. All engines have to be
// one, or nothing is.
//
// An engine whose record hands content on to another engine's (the queue: a
// delivery names the body of the acceptance) registers after that one: it is
// asked first, so that what moves between the two questions is seen at least once.
type Keeper interface {
	Engine
	// Live calls mark with the number of every record that its rows name,
	// because meta or body are read through them, and with the bytes of its body
	// as far as they are known.
	Live(mark func(seq uint64, size int64)) error
	// Lasting reports whether records of that kind always stay. They are few,
	// and make something of a log whose checkpoints are all lost.
	Lasting(log.Kind) bool
}

// TidyOptions say how thorough Tidy is. The zero value is for every day.
type TidyOptions struct {
	// Rate bounds what is read and written, in bytes a second; 0: not.
	Rate int64
	// Growth is how many bytes the log grows by before the next checkpoint.
	// Default 64 MiB; twice the last checkpoint when that is more.
	Growth int64
	// Force checkpoints at once and compacts whatever that saves anything.
	Force bool
}

// Tidied is what Tidy did.
type Tidied struct {
	Checkpoints int   `json:"checkpoints"`
	Segments    int   `json:"segments"` // rewritten
	Before      int64 `json:"before"`   // bytes of the log's files
	After       int64 `json:"after"`
}

// Disk is what the log takes, as Tidy saw it last.
type Disk struct {
	Bytes      int64  // of all files of the log
	Live       int64  // of it what is needed, estimated
	Segments   int    // complete ones
	Checkpoint uint64 // position of the newest; 0: none
	At         time.Time
}

// Disk returns the figures of the last Tidy.
func (j *Journal) Disk() Disk { j.mu.Lock(); defer j.mu.Unlock(); return j.disk }

const (
	growth     = 64 << 20
	recordCost = 1 << 10  // assumed for a live record beside its body
	worthwhile = 64 << 10 // bytes to be saved in a segment; less where segments are small
	fewSmall   = 8        // small segments beside each other that are merged
	// askEvery is how often the engines are asked what they need, which reads
	// all of the view, while there is neither a new checkpoint nor a full disk.
	askEvery = time.Hour
)

// Tidy reclaims disk: it writes a checkpoint when the log has grown enough, and
// compacts complete segments that are mostly dead, or many and small, as far as
// the checkpoint before the newest goes. It may be called at any time after
// Start, one at a time, and can be ended by ctx at any time. On a disk below its
// floor only what frees much is done.
func (j *Journal) Tidy(ctx context.Context, opt TidyOptions) (t Tidied, err error) {
	if !j.tidying.CompareAndSwap(false, true) {
		return t, errors.New("the store is being tidied already")
	}
	defer j.tidying.Store(false)
	if err := j.Err(); err != nil {
		return t, err
	}
	for _, e := range j.all {
		if _, ok := e.(Keeper); !ok {
			return t, fmt.Errorf("engine %T does not say what it needs", e)
		}
	}
	p := &tidy{j: j, opt: opt, full: j.view.Full(), pace: &pacer{ctx: ctx, rate: opt.Rate, begun: time.Now()}}
	if p.use, err = j.lg.Usage(); err != nil {
		return t, err
	}
	t.Before, t.After = p.use.Bytes, p.use.Bytes
	if err := p.checkpoint(ctx, &t); err != nil {
		return t, err
	}
	if t.Checkpoints == 0 && !p.full && !opt.Force && time.Since(j.Disk().At) < askEvery {
		return t, nil
	}
	if err := p.compact(ctx, &t); err != nil {
		return t, err
	}
	u, err := j.lg.Usage()
	if err != nil {
		return t, err
	}
	t.After = u.Bytes
	j.mu.Lock()
	j.disk = Disk{Bytes: u.Bytes, Live: min(u.Bytes, max(0, p.needed)), Segments: len(u.Segments), At: time.Now().UTC()}
	if n := len(p.points); n > 0 {
		j.disk.Checkpoint = p.points[n-1].at
	}
	j.mu.Unlock()
	if t.Segments > 0 {
		j.slog.Info("log compacted", "segments", t.Segments, "before", t.Before, "after", t.After)
	}
	return t, nil
}

// tidy is one run of Tidy.
type tidy struct {
	j      *Journal
	opt    TidyOptions
	full   bool
	pace   *pacer
	use    log.Usage
	points []checkpoint
	live   []need
	needed int64 // bytes of the log that stay, estimated
}

// checkpoint writes one when it is time, and sees to it that those in points
// can be read.
func (p *tidy) checkpoint(ctx context.Context, t *Tidied) (err error) {
	j := p.j
	if p.points, err = j.checkpoints(); err != nil {
		return err
	}
	whole := p.points[:0:0]
	for i := range p.points {
		c := &p.points[i]
		if !j.proven[c.ref.Seq] {
			err := j.readable(ctx, c, p.pace.wait)
			if errors.Is(err, log.ErrDamaged) {
				j.noteDamaged("a checkpoint of the index", err)
				continue
			}
			if err != nil {
				return fmt.Errorf("read checkpoint %d: %w", c.ref.Seq, err)
			}
			j.proven[c.ref.Seq] = true
		}
		whole = append(whole, *c)
	}
	want := 0
	switch {
	case p.full:
	case len(whole) < len(p.points):
		want = 2 // both anew: the damaged one leaves the list of two
	case p.opt.Force && (len(p.points) < 2 || j.Applied() > p.points[0].at+2):
		want = 2
	case p.grown() >= p.due():
		want = 1
	}
	for range want {
		if err := j.Checkpoint(ctx, p.pace.wait); err != nil {
			return err
		}
		t.Checkpoints++
	}
	if want == 0 {
		p.points = whole
		return nil
	}
	if p.points, err = j.checkpoints(); err != nil {
		return err
	}
	p.use, err = j.lg.Usage()
	return err
}

// grown is how much the log grew by since the last checkpoint.
func (p *tidy) grown() int64 {
	n, at := p.use.Bytes, uint64(0)
	if k := len(p.points); k > 0 {
		at, n = p.points[k-1].at, n-p.points[k-1].size
	}
	for _, s := range p.use.Segments {
		if s.Last <= at {
			n -= s.Bytes + s.Bodies
		}
	}
	return n
}

func (p *tidy) due() int64 {
	d := p.opt.Growth
	if d <= 0 {
		d = growth
	}
	if k := len(p.points); k > 0 {
		d = max(d, 2*p.points[k-1].size)
	}
	return d
}

// compact rewrites what pays, the emptiest first.
func (p *tidy) compact(ctx context.Context, t *Tidied) error {
	j := p.j
	if len(p.points) < 2 {
		p.needed = p.use.Bytes
		return nil
	}
	if !p.full {
		if err := j.view.Flush(ctx); err != nil {
			return fmt.Errorf("write view: %w", err)
		}
	}
	floor := min(p.points[0].at, j.view.Durable())
	if err := p.ask(); err != nil {
		return err
	}
	runs := p.runs(floor)
	for i := range p.points { // the newest too: it is what a rebuild tries first
		if c := &p.points[i]; len(runs) > 0 && !j.proven[c.ref.Seq] {
			if err := j.readable(ctx, c, p.pace.wait); err != nil {
				return fmt.Errorf("read checkpoint %d back: %w", c.ref.Seq, err)
			}
			j.proven[c.ref.Seq] = true
		}
	}
	for _, r := range runs {
		s, err := j.lg.Compact(ctx, r.numbers, floor, func(rec log.Record) (bool, log.Kind, []byte) {
			p.pace.wait(len(rec.Meta) + int(rec.BodySize)) // its error is ctx's, which Compact sees
			return p.decide(rec)
		})
		switch {
		case errors.Is(err, log.ErrDamaged):
			j.noteDamaged("the message log", err)
			for _, n := range r.numbers {
				j.stubborn[n] = -1
			}
			continue
		case err != nil:
			return err
		}
		t.Segments += len(r.numbers)
		if s.Bytes*4 > (r.total-r.ext)*3 { // the estimate was wrong: not again until much less of it is needed
			j.stubborn[s.Number] = r.live
		}
	}
	return nil
}

// need is a record that is needed, and by which engines.
type need struct {
	seq  uint64
	size int64
	by   uint32 // bits by place in Journal.all
}

// ask collects what the engines need: see Keeper for the order.
func (p *tidy) ask() error {
	for i, e := range slices.Backward(p.j.all) {
		if err := e.(Keeper).Live(func(seq uint64, size int64) { p.live = append(p.live, need{seq, size, 1 << i}) }); err != nil {
			return fmt.Errorf("ask what is needed: %w", err)
		}
	}
	slices.SortFunc(p.live, func(a, b need) int { return cmp.Compare(a.seq, b.seq) })
	k := 0
	for _, n := range p.live {
		if k > 0 && p.live[k-1].seq == n.seq {
			p.live[k-1].size = max(p.live[k-1].size, n.size)
			p.live[k-1].by |= n.by
			continue
		}
		p.live[k] = n
		k++
	}
	p.live = p.live[:k]
	return nil
}

// decide says what becomes of a record at or before the floor. State is not
// its business any more, since both checkpoints have it; only what is read
// through rows.
func (p *tidy) decide(r log.Record) (keep bool, kind log.Kind, meta []byte) {
	engines := p.j.engines[r.Kind]
	switch {
	case r.Kind == log.KindCheckpoint:
		return r.Seq >= p.points[0].ref.Seq, r.Kind, r.Meta
	case len(engines) == 0 && r.Kind != log.KindContent: // nobody here understands it
		return true, r.Kind, r.Meta
	}
	by := uint32(0)
	i := sort.Search(len(p.live), func(i int) bool { return p.live[i].seq >= r.Seq })
	if i < len(p.live) && p.live[i].seq == r.Seq {
		by = p.live[i].by
	}
	for k, e := range p.j.all {
		if slices.Contains(engines, e) && (by&(1<<k) != 0 || e.(Keeper).Lasting(r.Kind)) {
			return true, r.Kind, r.Meta
		}
	}
	if by == 0 {
		return false, 0, nil
	}
	// Another engine's rows name its body only: nobody shall apply it again.
	return true, log.KindContent, nil
}

// run is adjacent segments to be rewritten as one.
type run struct {
	numbers          []uint64
	live, total, ext int64
}

// runs chooses what to rewrite, and estimates what of the log is needed.
func (p *tidy) runs(floor uint64) (out []run) {
	segs := p.use.Segments
	lives := make([]int64, len(segs))
	for _, n := range p.live {
		i := sort.Search(len(segs), func(i int) bool { return segs[i].First > n.seq }) - 1
		if i >= 0 && n.seq <= segs[i].Last {
			lives[i] += n.size + recordCost
		}
	}
	p.needed = p.use.Bytes
	var r run
	var dead int64
	flush := func() {
		few := fewSmall
		if p.opt.Force {
			few = 2
		}
		enough := p.opt.Force || (r.total-r.live)*2 >= r.live // for what is written
		if len(r.numbers) > 0 && (dead > 0 && enough || len(r.numbers) >= few && !p.full) {
			out = append(out, r)
		}
		r, dead = run{}, 0
	}
	for i, s := range segs {
		if s.Last > floor {
			break
		}
		total := s.Bytes + s.Bodies
		live := min(lives[i], total)
		p.needed -= total - live
		had, tried := p.j.stubborn[s.Number]
		skip := tried && (had < 0 || live*4 >= had*3)
		least := min(worthwhile, p.j.segment/16)
		if p.opt.Force {
			least = min(4<<10, least)
		}
		pays := total-live >= least
		switch {
		case p.full:
			pays = pays && live*4 < total
		case p.opt.Force:
			pays = pays && live*8 < total*7
		default:
			pays = pays && live*2 < total
		}
		small := s.Bytes < p.j.segment/8
		if p.full && !pays {
			small = false
		}
		if skip && !small || had < 0 || !pays && !small {
			flush()
			continue
		}
		if len(r.numbers) >= log.MaxMerge || r.live+live > p.j.segment {
			flush()
		}
		r.numbers = append(r.numbers, s.Number)
		r.live, r.total, r.ext = r.live+live, r.total+total, r.ext+s.Bodies
		if pays && !skip {
			dead += total - live
		}
	}
	flush()
	slices.SortStableFunc(out, func(a, b run) int {
		return cmp.Compare(float64(a.live)/float64(a.total+1), float64(b.live)/float64(b.total+1))
	})
	return out
}

// pacer holds a bound of bytes a second.
type pacer struct {
	ctx   context.Context
	rate  int64
	begun time.Time
	done  int64
}

func (p *pacer) wait(n int) error {
	if p.rate <= 0 {
		return p.ctx.Err()
	}
	p.done += int64(n)
	ahead := time.Duration(float64(p.done)/float64(p.rate)*float64(time.Second)) - time.Since(p.begun)
	if ahead < 20*time.Millisecond {
		return p.ctx.Err()
	}
	t := time.NewTimer(ahead)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-p.ctx.Done():
		return context.Cause(p.ctx)
	}
}
