! As stream.cpp: mpirun -n RANKS stream_fortran FLOW SAMPLES FILE
program stream
    use, intrinsic :: iso_fortran_env, only: int64, real64
    use mpi
    use fastmaf
    implicit none
    type(flow_model) :: model
    type(flow_evaluator) :: flow
    character(len=1000) :: flow_file, text, file
    integer :: rank, ranks, handle, error
    integer(int64) :: total, first, last
    integer(mpi_offset_kind) :: place
    real(real64), allocatable :: samples(:, :)

    call mpi_init(error)
    call mpi_comm_rank(mpi_comm_world, rank, error)
    call mpi_comm_size(mpi_comm_world, ranks, error)
    call get_command_argument(1, flow_file)
    call get_command_argument(2, text)
    call get_command_argument(3, file)
    read (text, *) total
    call model%open(trim(flow_file))
    call flow%create(model)
    first = total * rank / ranks
    last = total * (rank + 1) / ranks
    allocate (samples(model%features(), last - first))
    call flow%sample(samples, seed=1_int64, offset=first)
    call mpi_file_open(mpi_comm_world, trim(file), mpi_mode_create + mpi_mode_wronly, mpi_info_null, handle, error)
    call mpi_file_set_size(handle, total * model%features() * 8, error)  ! nothing is left of a longer one
    place = first * model%features() * 8
    call mpi_file_write_at_all(handle, place, samples, size(samples), mpi_double_precision, mpi_status_ignore, error)
    call mpi_file_close(handle, error)
    call mpi_finalize(error)
end program
