package mailstore_test

import (
	"fmt"
	"testing"

	"github.com/google/go-cmp/cmp"

	"posthouse/mailstore"
)

// validity is the UIDVALIDITY of a mailbox's INBOX.
func (w *world) validity(n byte) uint32 {
	w.t.Helper()
	st, err := w.folder(n, "INBOX").Status()
	if err != nil {
		w.t.Fatal(err)
	}
	return st.UIDValidity
}

func TestANewMailboxHasItsFoldersSubscribed(t *testing.T) {
	w := newWorld(t, mailstore.Options{})
	if w.s.Has(boxID(1)) {
		t.Fatal("a mailbox that nobody made is there")
	}
	mb := w.create(1)
	w.create(1)
	var got []string
	for _, f := range mb.Folders() {
		got = append(got, fmt.Sprint(f.Name, f.Use, f.Subscribed))
	}
	want := []string{"INBOXtrue", `Archive\Archivetrue`, `Drafts\Draftstrue`, `Junk\Junktrue`, `Sent\Senttrue`, `Trash\Trashtrue`}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Fatal(diff)
	}
	w.sameAfterReplay(1)
}

func TestFoldersKeepTheirRules(t *testing.T) {
	w := newWorld(t, mailstore.Options{})
	mb := w.create(1)
	ctx := t.Context()
	for i, c := range []struct{ got, want error }{
		{mb.CreateFolder(ctx, "inbox", ""), mailstore.ErrExists},
		{mb.CreateFolder(ctx, "a//b", ""), mailstore.ErrName},
		{mb.CreateFolder(ctx, "/a", ""), mailstore.ErrName},
		{mb.CreateFolder(ctx, "a\x00", ""), mailstore.ErrName},
		{mb.CreateFolder(ctx, "a*", ""), mailstore.ErrName},
		{mb.CreateFolder(ctx, "e\u0301", ""), nil},
		{mb.CreateFolder(ctx, "\u00e9", ""), mailstore.ErrExists},
		{mb.CreateFolder(ctx, "a/b/c", ""), nil},
		{mb.DeleteFolder(ctx, "Inbox"), mailstore.ErrHasInbox},
		{mb.DeleteFolder(ctx, "a/b"), nil},
		{mb.DeleteFolder(ctx, "a/b"), mailstore.ErrNoFolder},
		{mb.RenameFolder(ctx, "a", "a/x"), mailstore.ErrName},
		{mb.RenameFolder(ctx, "a", "Sent"), mailstore.ErrExists},
		{mb.RenameFolder(ctx, "none", "b"), mailstore.ErrNoFolder},
		{mb.RenameFolder(ctx, "a", "n/m"), nil},
		{mb.Subscribe(ctx, "gone", true), nil},
		{mb.Subscribe(ctx, "Junk", false), nil},
	} {
		if c.got != c.want {
			t.Errorf("step %d: %v, want %v", i, c.got, c.want)
		}
	}
	var got []string
	for _, f := range mb.Folders() {
		got = append(got, fmt.Sprintf("%s sub=%v no=%v kids=%v", f.Name, f.Subscribed, f.NoSelect, f.Children))
	}
	want := []string{
		"INBOX sub=true no=false kids=false", "Archive sub=true no=false kids=false", "Drafts sub=true no=false kids=false",
		"Junk sub=false no=false kids=false", "Sent sub=true no=false kids=false", "Trash sub=true no=false kids=false",
		"gone sub=true no=true kids=false", "n sub=false no=false kids=true", "n/m sub=false no=false kids=true",
		"n/m/b sub=false no=true kids=true", "n/m/b/c sub=false no=false kids=false", "\u00e9 sub=false no=false kids=false",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	w.sameAfterReplay(1)
}

func TestAFolderMadeAgainHasAnotherUIDValidity(t *testing.T) {
	w := newWorld(t, mailstore.Options{})
	mb := w.create(1)
	seen := map[uint32]bool{}
	for range 4 {
		if err := mb.CreateFolder(t.Context(), "a", ""); err != nil {
			t.Fatal(err)
		}
		f := w.folder(1, "a")
		st, _ := f.Status()
		if seen[st.UIDValidity] {
			t.Fatal("UIDVALIDITY used again")
		}
		seen[st.UIDValidity] = true
		if _, _, err := f.Append(t.Context(), []mailstore.AppendMessage{{Draft: w.draft(text("x")), Structure: structure(text("x"))}}); err != nil {
			t.Fatal(err)
		}
		if err := mb.DeleteFolder(t.Context(), "a"); err != nil {
			t.Fatal(err)
		}
		if _, err := f.Status(); err != mailstore.ErrNoFolder {
			t.Fatal(err)
		}
		w.crash(true)
		mb = w.box(1)
	}
	before, _ := w.folder(1, "INBOX").Status()
	if err := w.s.Renew(t.Context()); err != nil {
		t.Fatal(err)
	}
	after, _ := w.folder(1, "INBOX").Status()
	if after.UIDValidity <= before.UIDValidity || seen[after.UIDValidity] {
		t.Fatal("not renewed")
	}
	w.sameAfterReplay(1)
}

// Its node forgot it with an older disk, was renewed, and hears anew that it is
// the mailbox's home.
func TestAMailboxThatIsMadeAgainAfterARenewalHasALaterUIDValidity(t *testing.T) {
	made := func(w *world) uint32 {
		if err := w.s.Create(t.Context(), boxID(1), 1); err != nil {
			t.Fatal(err)
		}
		return w.validity(1)
	}
	first := made(newWorld(t, mailstore.Options{}))
	again := newWorld(t, mailstore.Options{})
	if err := again.s.RenewAt(t.Context(), 1); err != nil {
		t.Fatal(err)
	}
	if v := made(again); v <= first {
		t.Errorf("UIDVALIDITY was %d, now it is %d", first, v)
	}
}

func TestAMailboxThatWasLostElsewhereHasALaterUIDValidity(t *testing.T) {
	w := newWorld(t, mailstore.Options{})
	validity := w.validity
	w.create(1)
	if err := w.s.Create(t.Context(), boxID(2), 3); err != nil {
		t.Fatal(err)
	}
	if validity(2) <= validity(1)+2<<20 {
		t.Errorf("three epochs lie between %d and %d", validity(1), validity(2))
	}
	before := validity(2)
	if err := w.s.Renew(t.Context()); err != nil {
		t.Fatal(err)
	}
	if validity(2) <= before {
		t.Errorf("renewed from %d to %d", before, validity(2))
	}
	before = validity(2)
	w.crash(true)
	if validity(2) != before {
		t.Errorf("%d after a replay, %d before", validity(2), before)
	}
	w.tidy()
	w.crash(true)
	if validity(2) != before {
		t.Errorf("%d after a replay of the tidied log, %d before", validity(2), before)
	}
	w.sameAfterReplay(2)
}
