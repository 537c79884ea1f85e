package mailstore_test

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"posthouse/mailstore"
	"posthouse/mailstore/journal"
	"posthouse/mailstore/journal/journaltest"
	"posthouse/transport"
)

// model is what the store should hold, as simply as it can be said.
type model struct {
	w        *world
	boxes    map[byte]*modelBox
	sent     []sent // deliveries so far, to repeat
	sessions []*session
	appended int
}

type sent struct {
	id      transport.MessageID
	subject string
	boxes   []byte
}

type modelBox struct {
	folders  map[string]*modelFolder
	validity uint32 // the highest so far
}

type modelFolder struct {
	validity uint32
	next     mailstore.UID
	mod      mailstore.ModSeq
	msgs     map[mailstore.UID]modelMsg
}

type modelMsg struct{ subject, flags string }

// session is a client that keeps up by ChangesSince alone.
type session struct {
	box   byte
	name  string
	valid uint32
	mod   mailstore.ModSeq
	next  mailstore.UID
	msgs  map[mailstore.UID]string
}

var modelNames = []string{"INBOX", "Archive", "a", "a/b", "c"}

func (m *model) folder(rt *rapid.T) (byte, string, *modelFolder, *mailstore.Folder) {
	n := rapid.SampledFrom([]byte{1, 2}).Draw(rt, "box")
	name := rapid.SampledFrom(slices.Sorted(maps.Keys(m.boxes[n].folders))).Draw(rt, "folder")
	f, err := m.w.box(n).Folder(name)
	if err != nil {
		rt.Fatalf("open %d %s: %v", n, name, err)
	}
	return n, name, m.boxes[n].folders[name], f
}

// some draws UIDs, mostly of messages that exist.
func some(rt *rapid.T, f *modelFolder) (uids []mailstore.UID) {
	return rapid.SliceOfN(rapid.Custom(func(t *rapid.T) mailstore.UID {
		return mailstore.UID(rapid.IntRange(1, int(f.next)).Draw(t, "uid"))
	}), 1, 6).Draw(rt, "uids")
}

func (f *modelFolder) there(uids []mailstore.UID) (out []mailstore.UID) {
	for _, u := range uids {
		if _, ok := f.msgs[u]; ok {
			out = append(out, u)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

func (f *modelFolder) put(uid mailstore.UID, m modelMsg) {
	f.msgs[uid] = m
	f.next = max(f.next, uid+1)
}

func flagString(fs []mailstore.Flag) string {
	var s []string
	for _, f := range fs {
		s = append(s, string(f))
	}
	slices.Sort(s)
	return strings.Join(s, " ")
}

func (m *model) add(rt *rapid.T, n byte) {
	if m.boxes[n] != nil {
		return
	}
	m.w.create(n)
	b := &modelBox{folders: map[string]*modelFolder{}}
	m.boxes[n] = b
	for _, fi := range m.w.box(n).Folders() {
		m.learn(rt, n, fi.Name)
	}
}

// learn takes a new folder's UIDVALIDITY, which must be one never seen.
func (m *model) learn(rt *rapid.T, n byte, name string) *modelFolder {
	f, err := m.w.box(n).Folder(name)
	if err != nil {
		rt.Fatalf("new folder %s: %v", name, err)
	}
	st, err := f.Status()
	if err != nil {
		rt.Fatal(err)
	}
	mf := &modelFolder{validity: st.UIDValidity, next: st.UIDNext, msgs: map[mailstore.UID]modelMsg{}}
	m.boxes[n].folders[name] = mf
	return mf
}

func (m *model) deliver(rt *rapid.T, s sent) {
	rs, err := m.w.s.Deliver(m.w.t.Context(), m.w.delivery(s.id, text(s.subject), s.boxes...))
	if err != nil {
		rt.Fatal(err)
	}
	for _, r := range rs {
		if r.Outcome != transport.Delivered {
			rt.Fatalf("%+v", r)
		}
	}
}

func (m *model) check(rt *rapid.T) {
	for n, b := range m.boxes {
		mb := m.w.box(n)
		var names []string
		var count, size int64
		for _, fi := range mb.Folders() {
			if fi.NoSelect {
				continue
			}
			names = append(names, fi.Name)
			f, err := mb.Folder(fi.Name)
			if err != nil {
				rt.Fatal(err)
			}
			mf := b.folders[fi.Name]
			if mf == nil {
				rt.Fatalf("folder %s should not be there", fi.Name)
			}
			st, infos, err := f.List()
			if err != nil {
				rt.Fatal(err)
			}
			got, last, unseen, deleted := map[mailstore.UID]modelMsg{}, mailstore.UID(0), uint32(0), uint32(0)
			for _, i := range infos {
				msg, err := f.Message(i.UID)
				if err != nil {
					rt.Fatal(err)
				}
				got[i.UID] = modelMsg{msg.Structure.Envelope.Subject, flagString(i.Flags)}
				if i.UID <= last || i.ModSeq > st.HighestModSeq {
					rt.Fatalf("%s: message %+v after %d in %+v", fi.Name, i, last, st)
				}
				last = i.UID
				count++
				size += i.Size
				if !slices.Contains(i.Flags, mailstore.Seen) {
					unseen++
				}
				if slices.Contains(i.Flags, mailstore.Deleted) {
					deleted++
				}
			}
			if diff := cmp.Diff(mf.msgs, got, cmp.AllowUnexported(modelMsg{})); diff != "" {
				rt.Fatalf("%d %s: %s", n, fi.Name, diff)
			}
			if st.UIDValidity != mf.validity || st.UIDNext < mf.next || st.UIDNext <= last || st.HighestModSeq < mf.mod ||
				int(st.Messages) != len(infos) || st.Unseen != unseen || st.Deleted != deleted {
				rt.Fatalf("%d %s: %+v, model validity %d next %d mod %d", n, fi.Name, st, mf.validity, mf.next, mf.mod)
			}
			mf.next, mf.mod = st.UIDNext, st.HighestModSeq
		}
		slices.Sort(names)
		if diff := cmp.Diff(slices.Sorted(maps.Keys(b.folders)), names); diff != "" {
			rt.Fatalf("folders of %d: %s", n, diff)
		}
		if c, s := mb.Usage(); c != count || s != size {
			rt.Fatalf("usage of %d is %d, %d; want %d, %d", n, c, s, count, size)
		}
	}
}

// sync lets a session catch up; it must then have what a fresh one would see.
func (m *model) sync(rt *rapid.T, s *session) {
	mf := m.boxes[s.box].folders[s.name]
	if mf == nil {
		return
	}
	f, err := m.w.box(s.box).Folder(s.name)
	if err != nil {
		rt.Fatal(err)
	}
	if s.valid != mf.validity {
		*s = session{box: s.box, name: s.name, valid: mf.validity, next: 1, msgs: map[mailstore.UID]string{}}
	}
	c, err := f.ChangesSince(s.mod)
	if err != nil {
		rt.Fatal(err)
	}
	if c.Forgotten {
		rt.Fatal("forgotten far too early")
	}
	for _, u := range c.Expunged {
		if _, ok := s.msgs[u]; !ok {
			rt.Fatalf("expunge of %d, which this session never had (since %d): %+v", u, s.mod, c)
		}
		delete(s.msgs, u)
	}
	for _, i := range c.Changed {
		if _, ok := s.msgs[i.UID]; !ok && i.UID < s.next {
			rt.Fatalf("message %d came back", i.UID)
		}
		s.msgs[i.UID] = flagString(i.Flags)
	}
	s.mod, s.next = c.Status.HighestModSeq, c.Status.UIDNext
	want := map[mailstore.UID]string{}
	for u, msg := range mf.msgs {
		want[u] = msg.flags
	}
	if diff := cmp.Diff(want, s.msgs); diff != "" {
		rt.Fatalf("session on %d %s: %s", s.box, s.name, diff)
	}
}

func TestAnyHistoryGivesTheMailboxThatTheModelHas(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		w := &world{t: t, disk: journaltest.NewDisk(t), opt: mailstore.Options{Cached: 3}}
		w.disk.Options.Log.SegmentSize = 4 << 10
		w.open()
		defer func() { w.disk.Close(t); w.s.Close() }()
		m := &model{w: w, boxes: map[byte]*modelBox{}}
		m.add(rt, 1)
		m.add(rt, 2)
		for _, n := range []byte{1, 2} {
			for _, name := range modelNames {
				m.sessions = append(m.sessions, &session{box: n, name: name, msgs: map[mailstore.UID]string{}})
			}
		}
		ctx := t.Context()
		rt.Repeat(map[string]func(*rapid.T){
			"": m.check,
			"deliver": func(rt *rapid.T) {
				s := sent{id: w.newID(), boxes: rapid.SampledFrom([][]byte{{1}, {2}, {2, 1}, {1, 1}}).Draw(rt, "boxes")}
				s.subject = s.id.String()
				m.deliver(rt, s)
				for _, n := range slices.Compact(slices.Clone(s.boxes)) {
					f, _ := w.box(n).Folder("INBOX")
					st, _ := f.Status()
					m.boxes[n].folders["INBOX"].put(st.UIDNext-1, modelMsg{subject: s.subject})
				}
				m.sent = append(m.sent, s)
			},
			"repeat": func(rt *rapid.T) {
				if len(m.sent) > 0 {
					m.deliver(rt, rapid.SampledFrom(m.sent).Draw(rt, "sent"))
				}
			},
			"append": func(rt *rapid.T) {
				_, _, mf, f := m.folder(rt)
				var msgs []mailstore.AppendMessage
				var want []modelMsg
				for range rapid.IntRange(1, 3).Draw(rt, "n") {
					m.appended++
					subject := fmt.Sprint("append ", m.appended)
					flags := drawFlags(rt)
					msgs = append(msgs, mailstore.AppendMessage{Draft: w.draft(text(subject)), Structure: structure(text(subject)), Flags: flags})
					want = append(want, modelMsg{subject, flagString(flags)})
				}
				validity, uids, err := f.Append(ctx, msgs)
				if err != nil || validity != mf.validity {
					rt.Fatal(validity, err)
				}
				for i, u := range uids {
					if u < mf.next {
						rt.Fatalf("UID %d used again", u)
					}
					mf.put(u, want[i])
				}
			},
			"flags": func(rt *rapid.T) {
				_, _, mf, f := m.folder(rt)
				uids := some(rt, mf)
				flags := drawFlags(rt)
				op := rapid.SampledFrom([]mailstore.FlagOp{mailstore.FlagsSet, mailstore.FlagsAdd, mailstore.FlagsRemove}).Draw(rt, "op")
				changed, _, err := f.SetFlags(ctx, uids, op, flags, 0)
				if err != nil {
					rt.Fatal(err)
				}
				there := mf.there(uids)
				for i, u := range there {
					msg := mf.msgs[u]
					msg.flags = combine(op, msg.flags, flagString(flags))
					mf.msgs[u] = msg
					if changed[i].UID != u || flagString(changed[i].Flags) != msg.flags {
						rt.Fatalf("%v, want %d %s", changed[i], u, msg.flags)
					}
				}
				if len(changed) != len(there) {
					rt.Fatal(changed, there)
				}
			},
			"expunge": func(rt *rapid.T) {
				_, _, mf, f := m.folder(rt)
				var uids []mailstore.UID
				if rapid.Bool().Draw(rt, "named") {
					uids = some(rt, mf)
				}
				var want []mailstore.UID
				for u, msg := range mf.msgs {
					if strings.Contains(msg.flags, `\Deleted`) && (uids == nil || slices.Contains(uids, u)) {
						want = append(want, u)
					}
				}
				slices.Sort(want)
				got, err := f.Expunge(ctx, uids)
				if err != nil || !slices.Equal(got, want) {
					rt.Fatal(got, want, err)
				}
				for _, u := range want {
					delete(mf.msgs, u)
				}
			},
			"copy": func(rt *rapid.T) {
				n, _, mf, f := m.folder(rt)
				to := rapid.SampledFrom(slices.Sorted(maps.Keys(m.boxes[n].folders))).Draw(rt, "to")
				move := rapid.Bool().Draw(rt, "move")
				uids := some(rt, mf)
				do := f.Copy
				if move {
					do = f.Move
				}
				res, err := do(ctx, uids, to)
				if err != nil || !slices.Equal(res.Source, mf.there(uids)) {
					rt.Fatal(res, err)
				}
				dest := m.boxes[n].folders[to]
				for i, u := range res.Source {
					if res.Dest[i] < dest.next {
						rt.Fatalf("UID %d used again", res.Dest[i])
					}
					dest.put(res.Dest[i], mf.msgs[u])
					if move {
						delete(mf.msgs, u)
					}
				}
			},
			"create": func(rt *rapid.T) {
				n, name := rapid.SampledFrom([]byte{1, 2}).Draw(rt, "box"), rapid.SampledFrom(modelNames).Draw(rt, "name")
				b := m.boxes[n]
				err := w.box(n).CreateFolder(ctx, name, "")
				if (b.folders[name] != nil) != (err == mailstore.ErrExists) {
					rt.Fatal(err)
				}
				if err == nil {
					m.grow(rt, n, name)
				}
			},
			"delete": func(rt *rapid.T) {
				n, name, _, f := m.folder(rt)
				if err := w.box(n).DeleteFolder(ctx, name); name == "INBOX" {
					if err != mailstore.ErrHasInbox {
						rt.Fatal(err)
					}
					return
				} else if err != nil {
					rt.Fatal(err)
				}
				if _, err := f.Status(); err != mailstore.ErrNoFolder {
					rt.Fatal(err)
				}
				delete(m.boxes[n].folders, name)
			},
			"rename": func(rt *rapid.T) {
				n, name, mf, _ := m.folder(rt)
				b := m.boxes[n]
				to := rapid.SampledFrom([]string{"a", "c", "d", "d/e"}).Draw(rt, "to")
				if err := w.box(n).RenameFolder(ctx, name, to); err != nil {
					return // the rules of names have their own test
				}
				if name == "INBOX" {
					old := mf.msgs
					mf.msgs = map[mailstore.UID]modelMsg{}
					m.grow(rt, n, to)
					for i, u := range slices.Sorted(maps.Keys(old)) {
						b.folders[to].put(mailstore.UID(i+1), old[u])
					}
					return
				}
				for _, k := range slices.Sorted(maps.Keys(b.folders)) {
					if k == name || strings.HasPrefix(k, name+"/") {
						b.folders[to+k[len(name):]] = b.folders[k]
						delete(b.folders, k)
					}
				}
				m.grow(rt, n, to)
			},
			"session": func(rt *rapid.T) { m.sync(rt, rapid.SampledFrom(m.sessions).Draw(rt, "session")) },
			"crash": func(rt *rapid.T) {
				w.crash(rapid.Bool().Draw(rt, "rebuild"))
			},
			"tidy": func(rt *rapid.T) { w.tidy() },
			"tidy in small steps": func(rt *rapid.T) {
				if _, err := w.j.Tidy(ctx, journal.TidyOptions{Growth: 4 << 10}); err != nil {
					rt.Fatal(err)
				}
			},
			"renew": func(rt *rapid.T) {
				if err := w.s.Renew(ctx); err != nil {
					rt.Fatal(err)
				}
				for n, b := range m.boxes {
					for name, mf := range b.folders {
						f, _ := w.box(n).Folder(name)
						st, _ := f.Status()
						if st.UIDValidity <= mf.validity {
							rt.Fatal("not renewed")
						}
						mf.validity = st.UIDValidity
						b.validity = max(b.validity, st.UIDValidity)
					}
				}
			},
		})
		for _, s := range m.sessions {
			m.sync(rt, s)
		}
		w.crash(true)
		m.check(rt)
	})
}

// grow notes that name and its parents exist; new ones have a UIDVALIDITY that
// no folder of the mailbox ever had.
func (m *model) grow(rt *rapid.T, n byte, name string) {
	b := m.boxes[n]
	for _, mf := range b.folders {
		b.validity = max(b.validity, mf.validity)
	}
	before := b.validity
	levels := strings.Split(name, "/")
	for i := range levels {
		if p := strings.Join(levels[:i+1], "/"); b.folders[p] == nil {
			if mf := m.learn(rt, n, p); mf.validity <= before {
				rt.Fatalf("UIDVALIDITY %d of %s is not new", mf.validity, p)
			}
		}
	}
}

func drawFlags(rt *rapid.T) []mailstore.Flag {
	return rapid.SliceOfNDistinct(rapid.SampledFrom([]mailstore.Flag{`\Seen`, `\Deleted`, `\Flagged`, "Later", "$Junk"}), 0, 3, rapid.ID).Draw(rt, "flags")
}

func combine(op mailstore.FlagOp, old, arg string) string {
	set := map[string]bool{}
	if op != mailstore.FlagsSet {
		for _, f := range strings.Fields(old) {
			set[f] = true
		}
	}
	for _, f := range strings.Fields(arg) {
		if op == mailstore.FlagsRemove {
			delete(set, f)
		} else {
			set[f] = true
		}
	}
	return strings.Join(slices.Sorted(maps.Keys(set)), " ")
}
