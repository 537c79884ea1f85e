package journaltest_test

import (
	"fmt"
	"io"
	"testing"

	"github.com/google/go-cmp/cmp"

	"posthouse/mailstore/journal"
	"posthouse/mailstore/journal/journaltest"
	"posthouse/mailstore/kv"
	"posthouse/mailstore/log"
)

type engine struct{ seen []string }

func (e *engine) Apply(r log.Record, b *kv.Batch, live bool) error {
	e.seen = append(e.seen, fmt.Sprintf("%d %s live=%v", r.Seq, r.Meta, live))
	b.Put([]byte(fmt.Sprintf("row/%03d", r.Seq)), r.Meta)
	return nil
}

func start(t *testing.T, d *journaltest.Disk) (*journal.Journal, *engine) {
	t.Helper()
	j, e := d.Open(t), &engine{}
	j.Register(e, log.KindAppend)
	if err := j.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	return j, e
}

func write(t *testing.T, j *journal.Journal, meta, body string) {
	t.Helper()
	e := log.Entry{Kind: log.KindAppend, Meta: []byte(meta)}
	if body != "" {
		e.Body = j.NewDraft()
		io.WriteString(e.Body, body)
		if err := e.Body.Seal(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if err := j.Append(e).Applied(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func rows(t *testing.T, j *journal.Journal) (rs []string) {
	t.Helper()
	if err := j.View().Scan([]byte("row/"), nil, func(k, v []byte) bool {
		rs = append(rs, string(k)+"="+string(v))
		return true
	}); err != nil {
		t.Fatal(err)
	}
	return rs
}

func TestRecordsSurviveACrashAndReplayOnceTheViewIsGone(t *testing.T) {
	d := journaltest.NewDisk(t)
	j, e := start(t, d)
	write(t, j, "a", "body of a")
	write(t, j, "b", "")
	if diff := cmp.Diff([]string{"1 a live=true", "2 b live=true"}, e.seen); diff != "" {
		t.Fatal(diff)
	}
	d.Crash(t)

	j, _ = start(t, d)
	write(t, j, "c", "")
	want := []string{"row/001=a", "row/002=b", "row/003=c"}
	if diff := cmp.Diff(want, rows(t, j)); diff != "" {
		t.Fatal(diff)
	}
	d.Close(t)

	d.DropView(t)
	j, e = start(t, d)
	if diff := cmp.Diff([]string{"1 a live=false", "2 b live=false", "3 c live=false"}, e.seen); diff != "" {
		t.Fatal(diff)
	}
	if diff := cmp.Diff(want, rows(t, j)); diff != "" {
		t.Fatal(diff)
	}
	d.Close(t)

	d.DropView(t) // the body is readable under the reference that replay gives
	var ref log.Ref
	j = d.Open(t)
	j.Register(engineFunc(func(r log.Record) {
		if r.Seq == 1 {
			ref = r.Ref
		}
	}), log.KindAppend)
	if err := j.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	br, err := j.Body(ref).Open()
	if err != nil {
		t.Fatal(err)
	}
	defer br.Close()
	if got, _ := io.ReadAll(br); string(got) != "body of a" {
		t.Fatalf("body is %q", got)
	}
}

type engineFunc func(log.Record)

func (f engineFunc) Apply(r log.Record, b *kv.Batch, live bool) error { f(r); return nil }
