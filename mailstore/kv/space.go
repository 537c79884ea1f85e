package kv

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// remoteFS are the file systems that are refused, by f_type of statfs(2).
var remoteFS = map[int64]string{
	0x6969:     "NFS",
	0x517b:     "SMB",
	0xff534d42: "CIFS",
	0xfe534d42: "SMB2",
	0x5346414f: "AFS",
	0x00c36400: "Ceph",
	0x01021997: "9P",
}

func statfs(dir string) (FS, error) {
	var s unix.Statfs_t
	if err := unix.Statfs(dir, &s); err != nil {
		return FS{}, err
	}
	return FS{Total: int64(s.Blocks) * s.Bsize, Free: int64(s.Bavail) * s.Bsize, Type: int64(uint32(s.Type))}, nil
}

// space watches the floor and owns the ballast. The committer calls check,
// sink and float; anyone may call low.
type space struct {
	opt      Options
	path     string // of the ballast; "" for none
	memTable int64
	floor    int64
	ballast  int64
	need     int64 // bytes that an open, or a close, of Badger may take

	mu    sync.Mutex
	asked time.Time
	was   FS
	under bool // below the floor since; ends with some more than the floor
	sunk  bool // the ballast was given up

	room int64         // bytes that the tables under way may take
	open chan struct{} // closed when gate shall hold nobody any more
	look chan struct{} // a token: a table is about to be written
	quit chan struct{} // closed to end watch
	done chan struct{} // closed by the end of watch; nil when it never ran
}

// lowEvery is how old the answer of low may be.
const lowEvery = 100 * time.Millisecond

const smallDisk = 4 << 30

func newSpace(opt Options, ballast string) (*space, error) {
	fs, err := opt.Statfs(opt.Dir)
	if err != nil {
		return nil, fmt.Errorf("statfs %s: %w", opt.Dir, err)
	}
	s := &space{opt: opt, path: ballast, memTable: opt.MemTable, floor: opt.Floor, ballast: opt.Ballast, was: fs, open: make(chan struct{}), quit: make(chan struct{})}
	small := fs.Total < smallDisk
	if s.memTable == 0 {
		s.memTable = 16 << 20
		if small {
			s.memTable = 4 << 20
		}
	}
	s.memTable = max(s.memTable, 4<<20)
	if s.floor == 0 {
		s.floor = min(max(fs.Total/16, 32<<20), 256<<20)
	}
	switch {
	case s.ballast < 0 || ballast == "":
		s.ballast, s.path = 0, ""
	case s.ballast == 0:
		s.ballast = 4*s.memTable + 64<<20
		if small {
			s.ballast = 4*s.memTable + 32<<20
		}
	}
	// Two write-ahead files of twice a memtable, and tables for those that a
	// crash left.
	s.need = 4*s.memTable + 3*s.memTable + 8<<20
	if ballast == "" {
		s.need = 0
	}
	s.need = min(s.need, max(s.floor, 4*s.memTable))
	s.room = min(s.floor/2, 4*s.memTable)
	s.look = make(chan struct{}, 1)
	return s, nil
}

// The watch looks this often, for this long, after a table was begun. An idle
// view has no watch awake.
const (
	watchEvery = time.Millisecond
	watchFor   = 250 * time.Millisecond
)

// watch gives the ballast up once the disk was filled while Badger makes
// tables: it cannot be held then. It waits until who fills is done, since he
// would take the ballast too.
func (s *space) watch() {
	s.done = make(chan struct{})
	go func() {
		defer close(s.done)
		t := time.NewTimer(watchFor)
		defer t.Stop()
		for {
			select {
			case <-s.look:
			case <-s.quit:
				return
			}
			was := int64(-1)
			for until := time.Now().Add(watchFor); time.Now().Before(until); {
				now := s.free()
				if now < s.room && now >= was && was >= 0 {
					s.sink()
					break
				}
				was = now
				t.Reset(watchEvery)
				select {
				case <-t.C:
				case <-s.look:
					until = time.Now().Add(watchFor)
				case <-s.quit:
					return
				}
			}
		}
	}()
}

// begun starts the watch.
func (s *space) begun() {
	select {
	case s.look <- struct{}{}:
	default:
	}
}

// close ends the watch.
func (s *space) close() {
	close(s.quit)
	if s.done != nil {
		<-s.done
	}
}

// ask asks the file system. An error counts as no news.
func (s *space) ask() FS {
	if fs, err := s.opt.Statfs(s.opt.Dir); err == nil {
		s.was = fs
	}
	s.asked = time.Now()
	return s.was
}

func (s *space) free() int64 { s.mu.Lock(); defer s.mu.Unlock(); return s.ask().Free }

// enough reports whether Badger may be opened or closed.
func (s *space) enough() bool { return s.free() >= s.need }

// judge applies the hysteresis. Called with s.mu held.
func (s *space) judge(free int64) {
	if free < s.floor {
		s.under = true
		return
	}
	if !s.under {
		return
	}
	back := s.floor + s.floor/8
	if s.sunk {
		back += s.ballast
	}
	s.under = free < back
}

// low reports whether the disk is below its floor; the answer may be a moment
// old.
func (s *space) low() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if now := time.Now(); s.asked.IsZero() || now.Sub(s.asked) >= lowEvery {
		s.judge(s.ask().Free)
	}
	return s.under
}

// check asks now, gives the ballast up when there is no room for what is under
// way (not sooner: who fills the disk would take it too), and takes it back
// when there is space again. False: nothing may be written.
func (s *space) check() bool {
	s.mu.Lock()
	s.judge(s.ask().Free)
	under, sunk, scant := s.under, s.sunk, s.was.Free < s.room
	s.mu.Unlock()
	switch {
	case scant && !sunk:
		s.sink()
	case !under && sunk:
		s.float()
	}
	return !under
}

// GiveUpBallast frees the ballast of a view in dir that is not open, and says
// whether there was any: what has to be written before the view opens can be,
// on a full disk. The open view makes it anew when there is space again.
func GiveUpBallast(dir string) (freed bool, err error) {
	switch err := os.Remove(filepath.Join(dir, ballastFile)); {
	case errors.Is(err, os.ErrNotExist):
		return false, nil
	case err != nil:
		return false, fmt.Errorf("give up the ballast: %w", err)
	}
	return true, nil
}

// sink gives the ballast up: what Badger has begun can end.
func (s *space) sink() {
	if s.path == "" {
		return
	}
	if err := os.Remove(s.path); err != nil && !errors.Is(err, os.ErrNotExist) {
		s.opt.Logger.Error("ballast cannot be given up", "err", err)
	}
	s.mu.Lock()
	s.sunk = true
	s.mu.Unlock()
}

// float makes the ballast anew, when the disk stays above its floor with it.
func (s *space) float() {
	if s.path == "" {
		return
	}
	have := int64(0)
	if fi, err := os.Stat(s.path); err == nil {
		have = fi.Size()
	}
	sunk := have != s.ballast
	if sunk && s.free()+have >= s.floor+s.ballast {
		os.Remove(s.path)
		sunk = reserve(s.path, s.ballast, true) != nil
		if sunk {
			os.Remove(s.path)
		}
	}
	s.mu.Lock()
	s.sunk = sunk
	s.mu.Unlock()
}

// gatePoll is how often a held compaction looks for space.
const gatePoll = 100 * time.Millisecond

// gate holds a compaction before it writes a table while there is no room for
// it and its like: a write through a mapping to a full disk ends the process.
func (s *space) gate() {
	s.begun() // its watch gives the ballast up when it is needed
	for s.free() < s.room {
		t := time.NewTimer(gatePoll)
		select {
		case <-t.C:
		case <-s.open:
			t.Stop()
			return
		}
	}
}

// reserve makes path, or opens it, and gives it size bytes of real blocks; the
// length of the file becomes size only when grow is set.
func reserve(path string, size int64, grow bool) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	mode := uint32(unix.FALLOC_FL_KEEP_SIZE)
	if grow {
		mode = 0
	}
	for {
		if err = unix.Fallocate(int(f.Fd()), mode, 0, size); err != unix.EINTR {
			break
		}
	}
	if err != nil {
		return fmt.Errorf("reserve %d bytes for %s: %w", size, path, err)
	}
	return nil
}
