package journal

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"

	"posthouse/mailstore/kv"
	"posthouse/mailstore/log"
)

// A checkpoint is a record whose body holds the rows of the view at a position:
// exactly what a view that is durable up to there holds. So a view made from it
// and from the records after its position is the one that was lost, and of the
// records before only bodies and structures are still needed. Two are kept.

const checkpointVersion = 1

// checkpoint is one that stands in the log.
type checkpoint struct {
	at   uint64 // position of its rows
	rows uint64
	ref  log.Ref
	size int64 // of the body
}

// checkpointRows are the journal's own rows: one for each checkpoint kept.
var checkpointRows = []byte("j/c")

func checkpointKey(seq uint64) []byte {
	return binary.BigEndian.AppendUint64(slices.Clone(checkpointRows), seq)
}

func (c *checkpoint) meta() []byte {
	return binary.AppendUvarint(binary.AppendUvarint([]byte{checkpointVersion}, c.at), c.rows)
}

func (c *checkpoint) parse(r log.Record) error {
	c.ref, c.size = r.Ref, r.BodySize
	b := r.Meta
	if len(b) == 0 || b[0] != checkpointVersion {
		return fmt.Errorf("checkpoint %d is of a version that is not known: it was written by a newer Posthouse", r.Seq)
	}
	b = b[1:]
	for _, p := range []*uint64{&c.at, &c.rows} {
		v, n := binary.Uvarint(b)
		if n <= 0 {
			return fmt.Errorf("checkpoint %d: %w", r.Seq, log.ErrDamaged)
		}
		*p, b = v, b[n:]
	}
	return nil
}

func (c *checkpoint) row() []byte {
	b := []byte{checkpointVersion}
	for _, v := range []uint64{c.at, c.rows, c.ref.Segment, uint64(c.ref.Offset), c.ref.Seq, uint64(c.ref.CRC), uint64(c.size)} {
		b = binary.AppendUvarint(b, v)
	}
	return b
}

func (c *checkpoint) parseRow(b []byte) error {
	var vs [7]uint64
	if len(b) == 0 || b[0] != checkpointVersion {
		return fmt.Errorf("checkpoint row: %w", kv.ErrDamaged)
	}
	b = b[1:]
	for i := range vs {
		v, n := binary.Uvarint(b)
		if n <= 0 {
			return fmt.Errorf("checkpoint row: %w", kv.ErrDamaged)
		}
		vs[i], b = v, b[n:]
	}
	*c = checkpoint{at: vs[0], rows: vs[1], size: int64(vs[6]),
		ref: log.Ref{Segment: vs[2], Offset: int64(vs[3]), Seq: vs[4], CRC: uint32(vs[5])}}
	return nil
}

// checkpoints returns those that the view knows of, the oldest first.
func (j *Journal) checkpoints() (cs []checkpoint, err error) {
	var bad error
	err = j.view.Scan(checkpointRows, nil, func(_, v []byte) bool {
		var c checkpoint
		bad = c.parseRow(v)
		cs = append(cs, c)
		return bad == nil
	})
	return cs, errors.Join(err, bad)
}

// applyCheckpoint notes a checkpoint and forgets all but the one before it.
func (j *Journal) applyCheckpoint(r log.Record, b *kv.Batch) error {
	var c checkpoint
	if err := c.parse(r); err != nil {
		return err
	}
	had, err := j.checkpoints()
	if err != nil {
		return err
	}
	for len(had) > 1 {
		b.Delete(checkpointKey(had[0].ref.Seq))
		had = had[1:]
	}
	b.Put(checkpointKey(r.Seq), c.row())
	return nil
}

// Checker is an Engine that can tell whether its rows contradict each other.
type Checker interface {
	Check() error
}

// Checkpoint writes the view's rows into the log, after which the log before
// the checkpoint but one is no longer needed but for its content. pace is told
// of the bytes as they are written and may wait. Nothing is written when the
// view is damaged or contradicts itself: then it is no truth to build on.
func (j *Journal) Checkpoint(ctx context.Context, pace func(int) error) error {
	d := j.lg.NewDraft()
	c, err := j.dump(d, pace)
	if err == nil {
		err = d.Seal(ctx)
	}
	if err == nil { // after the reads: a table that turned bad reads as one without rows
		err = j.Verify(ctx)
	}
	if err != nil || c.at == 0 {
		d.Discard()
		if err != nil {
			err = fmt.Errorf("checkpoint: %w", err)
		}
		return err
	}
	j.lg.Roll() // what stands before it becomes a complete segment
	if err := j.Append(log.Entry{Kind: log.KindCheckpoint, Meta: c.meta(), Body: d}).Applied(ctx); err != nil {
		return fmt.Errorf("checkpoint: %w", err)
	}
	j.slog.Info("checkpoint written", "position", c.at, "rows", c.rows, "bytes", d.Size())
	return nil
}

// dump writes the rows: for each the lengths of key and value and both.
func (j *Journal) dump(d *log.Draft, pace func(int) error) (c checkpoint, err error) {
	w := bufio.NewWriterSize(d, 64<<10)
	var head []byte
	var bad error
	c.at, err = j.view.Dump(func(k, v []byte) bool {
		c.rows++
		head = binary.AppendUvarint(head[:0], uint64(len(k)))
		head = binary.AppendUvarint(head, uint64(len(v)))
		for _, b := range [][]byte{head, k, v} {
			if _, err := w.Write(b); err != nil {
				bad = err
				return false
			}
		}
		bad = pace(len(head) + len(k) + len(v))
		return bad == nil
	})
	if err = errors.Join(err, bad); err == nil {
		err = w.Flush()
	}
	return c, err
}

// Verify reads all of the view with its checksums and has the engines look for
// contradictions in their rows. What is wrong becomes a condition too.
func (j *Journal) Verify(ctx context.Context) error {
	if err := j.view.Verify(); err != nil {
		return err // the view has told of damage
	}
	for _, e := range j.all {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		if c, ok := e.(Checker); ok {
			if err := c.Check(); err != nil {
				if !errors.Is(err, kv.ErrDamaged) && !errors.Is(err, kv.ErrClosed) {
					j.noteOnce(CondViewWrong, fmt.Sprintf("the index of the mail store contradicts itself: %v", err))
				}
				return err
			}
		}
	}
	return nil
}

// readable reads a checkpoint's body whole, checked.
func (j *Journal) readable(ctx context.Context, c *checkpoint, pace func(int) error) error {
	r, err := j.lg.Body(c.ref).Open()
	if err != nil {
		return err
	}
	defer r.Close()
	b := make([]byte, 64<<10)
	for {
		n, err := r.Read(b)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err == nil {
			err = pace(n)
		}
		if err == nil && ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		if err != nil {
			return err
		}
	}
}

// restore fills an empty view from the newest checkpoint that is whole, where
// the log alone does not tell everything any more, and returns its position.
func (j *Journal) restore(ctx context.Context) (at uint64, err error) {
	if j.lg.Report().Compacted == 0 {
		return 0, nil
	}
	var found []checkpoint
	err = j.lg.Latest(ctx, log.KindCheckpoint, func(r log.Record) bool {
		var c checkpoint
		if err := c.parse(r); err != nil {
			j.note(CondDamaged, err.Error())
			return true
		}
		found = append(found, c)
		return len(found) < 2
	})
	if err != nil {
		return 0, fmt.Errorf("look for checkpoints: %w", err)
	}
	for i := range found {
		c := &found[i]
		err := j.readable(ctx, c, func(int) error { return nil })
		if err == nil {
			err = j.load(ctx, c)
		}
		switch {
		case err == nil:
			j.slog.Info("view made from a checkpoint", "position", c.at, "rows", c.rows)
			return c.at, nil
		case !errors.Is(err, log.ErrDamaged) && !errors.Is(err, kv.ErrDamaged):
			return 0, fmt.Errorf("checkpoint %d: %w", c.ref.Seq, err)
		}
		j.note(CondDamaged, fmt.Sprintf("a checkpoint of the index is damaged, the one before it is used: %v", err))
	}
	// What is left are the messages, where they arrived.
	j.renew = true
	j.note(CondHistoryLost, "the index was lost and no checkpoint of it can be read: messages of before are in the folders where they "+
		"arrived, without their flags, and what waited to be sent is held")
	return 0, j.emptied(ctx)
}

// emptied sees to it that the view has no rows: a load may have been cut short.
func (j *Journal) emptied(ctx context.Context) error {
	empty, err := j.view.Empty()
	if err == nil && !empty {
		err = j.view.Reset(ctx, "a load was not finished", false)
	}
	return err
}

func (j *Journal) load(ctx context.Context, c *checkpoint) error {
	if err := j.emptied(ctx); err != nil {
		return err
	}
	j.view.Target(j.lg.Report().End)
	body, err := j.lg.Body(c.ref).Open()
	if err != nil {
		return err
	}
	defer body.Close()
	r, n := bufio.NewReaderSize(body, 64<<10), uint64(0)
	var buf []byte
	return j.view.Load(ctx, c.at, func() (key, value []byte, ok bool, err error) {
		kl, err := binary.ReadUvarint(r)
		if errors.Is(err, io.EOF) {
			if n != c.rows {
				err = fmt.Errorf("%d rows instead of %d: %w", n, c.rows, log.ErrDamaged)
			} else {
				err = nil
			}
			return nil, nil, false, err
		}
		vl := uint64(0)
		if err == nil {
			vl, err = binary.ReadUvarint(r)
		}
		if err == nil && (kl > kv.MaxKey || vl > kv.MaxValue) {
			err = fmt.Errorf("row %d: %w", n, log.ErrDamaged)
		}
		if err == nil {
			buf = slices.Grow(buf[:0], int(kl+vl))[:kl+vl]
			_, err = io.ReadFull(r, buf)
		}
		if err != nil {
			return nil, nil, false, err
		}
		n++
		return buf[:kl], buf[kl:], true, nil
	})
}
